"""The catalogue's entries of the linear family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.linear.einsum import Einsum, einsum
from flax_customgrad.layers.linear.embed import Embed, attend, lookup
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.linear.linear_general import LinearGeneral, linear_general
from flax_customgrad.layers.linear.lora import LoRA, LoRALinear, lora
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal


def _tokens(*shape: int, size: int) -> jax.Array:
    """Ids of which small ones are frequent, as with words."""
    exponent = jax.random.uniform(jax.random.key(size), shape)
    return jnp.asarray(size**exponent, jnp.int32) - 1


def _attend(embed: nnx.Embed, query: jax.Array) -> jax.Array:
    return embed.attend(query)


_BF16: dict[str, Any] = {"dtype": jnp.bfloat16}
# A lora_b of zeros would hide errors in its gradient.
_LORA_B: dict[str, Any] = {"b_initializer": nnx.initializers.normal(1.0)}

ENTRIES = (
    Entry(
        "Linear",
        "linear",
        Linear,
        nnx.Linear,
        "exact",
        keeps="x, kernel",
        gain="float32 sums for kernel and bias; no bf16 copy of the kernel kept",
        source="https://github.com/jax-ml/jax/issues/34330",
        examples={
            "bias, batch axes of 8, 1 and 3": made(
                6, 4, **RANDOM_BIAS, inputs=(lambda: normal(8, 1, 3, 6),)
            ),
            "no bias": made(6, 4, use_bias=False, inputs=(lambda: normal(8, 6),)),
        },
        operations={linear: "bias, batch axes of 8, 1 and 3"},
        workloads={
            "4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),)),
            "256x4096 to 4096": made(4096, 4096, inputs=(lambda: normal(256, 4096),)),
            "2048x1024 to 1024, bf16": made(
                1024, 1024, **_BF16, inputs=(lambda: normal(2048, 1024, dtype=jnp.bfloat16),)
            ),
            "8x64 to 64": made(64, 64, inputs=(lambda: normal(8, 64),)),
        },
    ),
    Entry(
        "LinearGeneral",
        "linear",
        LinearGeneral,
        nnx.LinearGeneral,
        "exact",
        keeps="x, kernel",
        gain="float32 sums for kernel and bias; no bf16 copy of the kernel kept",
        source="https://github.com/jax-ml/jax/issues/34330",
        examples={
            "batch axis, bias": made(
                3,
                (2, 2),
                axis=-2,
                batch_axis={0: 8},
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 3, 5),),
            ),
            "free axes between two contracted ones, bias": made(
                (2, 3), (4, 2), axis=(1, -1), **RANDOM_BIAS, inputs=(lambda: normal(8, 2, 1, 5, 3),)
            ),
        },
        operations={linear_general: "free axes between two contracted ones, bias"},
        workloads={
            "heads, 8x512x512 to 8x64": made(512, (8, 64), inputs=(lambda: normal(8, 512, 512),)),
            "heads back": made(
                (8, 64), 512, axis=(-2, -1), inputs=(lambda: normal(8, 512, 8, 64),)
            ),
        },
    ),
    Entry(
        "Einsum",
        "linear",
        Einsum,
        nnx.Einsum,
        "exact",
        keeps="x, kernel",
        gain="float32 sums for kernel and bias; no bf16 copy of the kernel kept",
        source="https://github.com/jax-ml/jax/issues/34330",
        examples={
            "heads": made("nta,hab->nthb", (2, 3, 4), (2, 4), inputs=(lambda: normal(8, 5, 3),)),
            # c is in x, kernel and y; t only in x and k only in the kernel are summed away.
            "ellipsis, batch label, labels summed away, bias": made(
                "n...cta,hcabk->n...chb",
                (2, 2, 3, 4, 2),
                (2, 2, 4),
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 1, 2, 5, 3),),
            ),
        },
        operations={einsum: "ellipsis, batch label, labels summed away, bias"},
        workloads={
            "8x512x512, 8 heads of 64": made(
                "nta,hab->nthb", (8, 512, 64), (8, 64), inputs=(lambda: normal(8, 512, 512),)
            ),
        },
    ),
    Entry(
        "Embed",
        "linear",
        Embed,
        nnx.Embed,
        "exact",
        keeps="ids; for attend the query and the table",
        gain="float32 sums of the rows of repeated tokens",
        examples={
            "lookup, ids that repeat, at the bounds and negative": made(
                6, 4, inputs=(lambda: (jnp.arange(24) * 7 % 12 - 6).reshape(8, 1, 3),)
            ),
            "lookup, one row": made(1, 4, inputs=(lambda: jnp.zeros((8, 2), jnp.int32),)),
            "attend, batch axes of 8, 1 and 3": made(
                6, 4, call=_attend, inputs=(lambda: normal(8, 1, 3, 4),)
            ),
        },
        operations={
            lookup: "lookup, ids that repeat, at the bounds and negative",
            attend: "attend, batch axes of 8, 1 and 3",
        },
        workloads={
            "8192 tokens of 32768 by 512": made(
                32768, 512, inputs=(lambda: _tokens(8192, size=32768),)
            ),
            "the same, bf16": made(
                32768, 512, **_BF16, inputs=(lambda: _tokens(8192, size=32768),)
            ),
            "attend, 1024x512 to 8192": made(
                8192, 512, call=_attend, inputs=(lambda: normal(1024, 512),)
            ),
        },
    ),
    Entry(
        "LoRA",
        "linear",
        LoRA,
        nnx.LoRA,
        "exact",
        keeps="x, lora_a, lora_b, and the rank-wide product between them",
        gain="float32 sums for both kernels; no bf16 copies of them kept",
        source="arXiv:2106.09685",
        examples={
            "batch axes of 8, 1 and 3": made(
                6, 2, 4, **_LORA_B, inputs=(lambda: normal(8, 1, 3, 6),)
            ),
        },
        operations={lora: "batch axes of 8, 1 and 3"},
        workloads={
            "4096x1024 to 1024, rank 16": made(
                1024, 16, 1024, inputs=(lambda: normal(4096, 1024),)
            ),
        },
    ),
    Entry(
        "LoRALinear",
        "linear",
        LoRALinear,
        nnx.LoRALinear,
        "exact",
        keeps="x, kernel, lora_a, lora_b, and the rank-wide product between them",
        gain="float32 sums for every kernel and bias; no bf16 copies of them kept",
        source="arXiv:2106.09685",
        examples={
            "bias": made(
                6,
                4,
                lora_rank=2,
                **_LORA_B,
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 3, 6),),
            ),
        },
        workloads={
            "4096x1024 to 1024, rank 16": made(
                1024, 1024, lora_rank=16, inputs=(lambda: normal(4096, 1024),)
            ),
        },
    ),
)
