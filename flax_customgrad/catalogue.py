"""The catalogue: one entry per layer, which the tests, the command line, benchmarks and docs read.

An entry says what a layer is, where it comes from and what its backward keeps, and makes examples
of it: small ones on which its gradient is proved, and workloads on which it is timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.linear.einsum import Einsum
from flax_customgrad.linear.embed import Embed
from flax_customgrad.linear.linear import Linear
from flax_customgrad.linear.linear_general import LinearGeneral
from flax_customgrad.linear.lora import LoRA, LoRALinear

Example = Callable[[type[nnx.Module]], tuple[Any, ...]]
"""Makes a layer of the given class, and inputs: (layer, *inputs), or (function, layer, *inputs)."""


@dataclass(frozen=True)
class Entry:
    """One layer of the library.

    Attributes:
        name: its public name, `flax_customgrad.<name>`.
        family: the folder that it lives in.
        module: the class.
        reference: the flax.nnx class that it stands in for; None where there is none.
        gradient: "exact" where the backward is the derivative of the forward, "surrogate" where
            it is meant to differ.
        keeps: what the backward keeps.
        gain: what the hand-written backward is for, in a few words.
        source: paper or issue behind it; empty where the mathematics is elementary.
        examples: makers of small examples by name, for `check_vjp`. They take the class to build,
            `module` or `reference`; inputs have a leading axis of 8, one per device of a mesh.
        workloads: makers of examples of a realistic size by name, for benchmarks.
    """

    name: str
    family: str
    module: type[nnx.Module]
    reference: type[nnx.Module] | None
    gradient: Literal["exact", "surrogate"]
    keeps: str
    gain: str
    source: str = ""
    examples: Mapping[str, Example] = field(default_factory=dict)
    workloads: Mapping[str, Example] = field(default_factory=dict)

    @property
    def is_drop_in(self) -> bool:
        """Whether the layer takes the place of one of flax.nnx, and `convert` uses it."""
        return self.reference is not None


def entries() -> tuple[Entry, ...]:
    """Every layer of the library, by family."""
    return (*_LINEAR,)


def find(name: str) -> Entry:
    """The entry of a layer.

    Raises:
        KeyError: there is none; the error lists the names.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    raise KeyError(f"no layer {name!r}; there are {', '.join(e.name for e in entries())}")


def drop_ins() -> dict[type[nnx.Module], type[nnx.Module]]:
    """From each flax.nnx layer to the layer of this library that takes its place."""
    return {e.reference: e.module for e in entries() if e.reference is not None}


def _normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def _tokens(*shape: int, size: int) -> jax.Array:
    """Ids of which small ones are frequent, as words are."""
    exponent = jax.random.uniform(jax.random.key(size), shape)
    return jnp.asarray(size**exponent, jnp.int32) - 1


def _made(*args: Any, inputs: tuple[Any, ...], call: Any = None, **kwargs: Any) -> Example:
    """An example whose layer is built as `cls(*args, **kwargs, rngs=...)`."""

    def make(cls: Any) -> tuple[Any, ...]:
        layer = cls(*args, **kwargs, rngs=nnx.Rngs(0))
        made = tuple(x() if callable(x) else x for x in inputs)
        return (layer, *made) if call is None else (call, layer, *made)

    return make


def _attend(embed: nnx.Embed, query: jax.Array) -> jax.Array:
    return embed.attend(query)


_BF16 = {"dtype": jnp.bfloat16}

_LINEAR = (
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
            "bias": _made(6, 4, inputs=(lambda: _normal(8, 6),)),
            "no bias, two batch axes": _made(
                6, 4, use_bias=False, inputs=(lambda: _normal(8, 3, 6),)
            ),
        },
        workloads={
            "4096x1024 to 1024": _made(1024, 1024, inputs=(lambda: _normal(4096, 1024),)),
            "256x4096 to 4096": _made(4096, 4096, inputs=(lambda: _normal(256, 4096),)),
            "2048x1024 to 1024, bf16": _made(
                1024, 1024, **_BF16, inputs=(lambda: _normal(2048, 1024, dtype=jnp.bfloat16),)
            ),
            "8x64 to 64": _made(64, 64, inputs=(lambda: _normal(8, 64),)),
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
            "two axes": _made((2, 3), (4, 2), axis=(1, -1), inputs=(lambda: _normal(8, 2, 3),)),
            "batch axis": _made(
                3, (2, 2), axis=-2, batch_axis={0: 8}, inputs=(lambda: _normal(8, 3, 5),)
            ),
        },
        workloads={
            "heads, 8x512x512 to 8x64": _made(512, (8, 64), inputs=(lambda: _normal(8, 512, 512),)),
            "heads back": _made(
                (8, 64), 512, axis=(-2, -1), inputs=(lambda: _normal(8, 512, 8, 64),)
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
            "heads": _made("nta,hab->nthb", (2, 3, 4), (2, 4), inputs=(lambda: _normal(8, 5, 3),)),
            "ellipsis": _made("...a,ab->...b", (3, 4), inputs=(lambda: _normal(8, 2, 3),)),
            "summed away": _made("nta,ab->nb", (3, 4), 4, inputs=(lambda: _normal(8, 5, 3),)),
        },
        workloads={
            "8x512x512, 8 heads of 64": _made(
                "nta,hab->nthb", (8, 512, 64), (8, 64), inputs=(lambda: _normal(8, 512, 512),)
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
            "lookup": _made(6, 4, inputs=(lambda: jnp.array([0, 1, 2, 2, 5, 1, 0, 3]),)),
            "one row": _made(1, 4, inputs=(lambda: jnp.zeros((8, 2), jnp.int32),)),
            "attend": _made(6, 4, call=_attend, inputs=(lambda: _normal(8, 4),)),
        },
        workloads={
            "8192 tokens of 32768 by 512": _made(
                32768, 512, inputs=(lambda: _tokens(8192, size=32768),)
            ),
            "the same, bf16": _made(
                32768, 512, **_BF16, inputs=(lambda: _tokens(8192, size=32768),)
            ),
            "attend, 1024x512 to 8192": _made(
                8192, 512, call=_attend, inputs=(lambda: _normal(1024, 512),)
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
            "alone": _made(
                6, 2, 4, b_initializer=nnx.initializers.normal(), inputs=(lambda: _normal(8, 6),)
            ),
        },
        workloads={
            "4096x1024 to 1024, rank 16": _made(
                1024, 16, 1024, inputs=(lambda: _normal(4096, 1024),)
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
            "bias": _made(
                6,
                4,
                lora_rank=2,
                b_initializer=nnx.initializers.normal(),
                inputs=(lambda: _normal(8, 6),),
            ),
        },
        workloads={
            "4096x1024 to 1024, rank 16": _made(
                1024, 1024, lora_rank=16, inputs=(lambda: _normal(4096, 1024),)
            ),
        },
    ),
)
