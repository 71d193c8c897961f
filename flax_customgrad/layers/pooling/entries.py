"""The catalogue's entries of the poolings; the examples cover windows that overlap and do not."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.layers.pooling.avg_pool import avg_pool, sum_pool
from flax_customgrad.layers.pooling.max_pool import extreme_pool, max_pool, min_pool
from flax_customgrad.layers.pooling.pool import pool
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import applied, normal

_FASTER = "float32 sums; gradients 2 to 20 times as fast on a CPU"


def _images(
    shape: tuple[int, ...], *window: Any, dtype: Any = jnp.float32, **kwargs: Any
) -> Example:
    """An example on images of a shape; the window is its shape, strides and padding."""
    names = ("window_shape", "strides", "padding")
    kwargs |= dict(zip(names, window, strict=False))
    return applied(lambda: normal(*shape, dtype=dtype), **kwargs)


_BIG = (32, 64, 64, 64)
_WORKLOADS = {
    "2x2 stride 2, 32x64x64x64": _images(_BIG, (2, 2), (2, 2)),
    "3x3 stride 2, 32x64x64x64": _images(_BIG, (3, 3), (2, 2), "SAME"),
    "3x3, 32x64x64x64": _images(_BIG, (3, 3), (1, 1), "SAME"),
    "3x3 stride 2, 32x64x64x64, bf16": _images(_BIG, (3, 3), (2, 2), "SAME", dtype=jnp.bfloat16),
}

ENTRIES = (
    Entry(
        "max_pool",
        "pooling",
        max_pool,
        nnx.max_pool,
        "exact",
        keeps="x",
        gain="gradients 8 to 20 times as fast on a CPU, in a fifth of the memory",
        examples={
            "overlap, strides, padding, two batch axes": _images(
                (8, 1, 5, 4, 2), (3, 2), (2, 1), "SAME"
            ),
            "no overlap, a remainder": _images((8, 7, 5, 2), (3, 2), (3, 2)),
            "1-D, padded": _images((8, 4, 2), (4,), (1,), ((2, 1),)),
        },
        operations={extreme_pool: "overlap, strides, padding, two batch axes"},
        workloads=_WORKLOADS,
    ),
    Entry(
        "min_pool",
        "pooling",
        min_pool,
        nnx.min_pool,
        "exact",
        keeps="x",
        gain="that of max_pool",
        examples={"1-D": _images((8, 4, 2), (3,), (2,), "SAME")},
        workloads={"3x3 stride 2, 32x64x64x64": _WORKLOADS["3x3 stride 2, 32x64x64x64"]},
    ),
    Entry(
        "avg_pool",
        "pooling",
        avg_pool,
        nnx.avg_pool,
        "exact",
        keeps="nothing",
        gain=_FASTER,
        examples={
            "overlap, strides": _images((8, 5, 4, 2), (3, 2), (2, 1), "SAME"),
            "no padding counted, overlap, strides, two batch axes": _images(
                (8, 1, 5, 4, 2), (2, 3), (1, 2), "SAME", count_include_pad=False
            ),
        },
        operations={sum_pool: "no padding counted, overlap, strides, two batch axes"},
        workloads=_WORKLOADS,
    ),
    Entry(
        "pool",
        "pooling",
        pool,
        nnx.pool,
        "exact",
        keeps="nothing of a sum, x of a maximum or minimum",
        gain=_FASTER,
        examples={
            "sum": _images((8, 5, 2), (3,), (2,), "SAME", init=0.0, reduce_fn=lax.add),
        },
        workloads={
            "sum 3x3, 32x64x64x64": _images(
                _BIG, (3, 3), (1, 1), "SAME", init=0.0, reduce_fn=lax.add
            )
        },
    ),
)
