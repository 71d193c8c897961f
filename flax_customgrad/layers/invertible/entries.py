"""The catalogue's entries of layers that find their input from their output."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.invertible.invertible_batch_norm_act import (
    InvertibleBatchNormAct,
    normalize_and_activate,
)
from flax_customgrad.layers.invertible.reversible import Reversible, reversible
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal, on_a_copy

_AFFINE: dict[str, Any] = {
    "scale_init": nnx.initializers.normal(1.0),
    "bias_init": nnx.initializers.normal(1.0),
    "negative_slope": 0.25,
}


def _masked(layer: Any, x: jax.Array) -> jax.Array:
    """Calls a layer with a mask that leaves some elements of each statistic out."""
    return layer(x, mask=jnp.arange(x.size).reshape(x.shape) % 5 != 0)


def _half(features: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(Linear(features, features, **RANDOM_BIAS, rngs=rngs), nnx.tanh)


def _list_of_blocks(cls: Any) -> tuple[Any, ...]:
    f, g, h = (_half(3, nnx.Rngs(i)) for i in range(3))
    return cls([f, h], [g, nnx.tanh]), normal(8, 6)


def _stack(length: int, *shape: int) -> Any:
    """Blocks made under `nnx.vmap`."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def halves(rngs: nnx.Rngs) -> nnx.Module:
        return _half(shape[-1] // 2, rngs)

    def make(cls: Any) -> tuple[Any, ...]:
        layer = cls(halves(nnx.Rngs(0)), halves(nnx.Rngs(1)), length=length)
        return on_a_copy, layer, normal(*shape)

    return make


ENTRIES = (
    Entry(
        "InvertibleBatchNormAct",
        "invertible",
        InvertibleBatchNormAct,
        None,
        "exact",
        keeps="its output, which the next layer keeps too, the parameters, three numbers a feature",
        gain="batch normalization and activation for no memory of their own",
        source="arXiv:1712.02616",
        examples={
            "masked": made(
                3, axis=1, call=_masked, **_AFFINE, inputs=(lambda: normal(8, 3, 1, 2),)
            ),
            "evaluation": made(
                3, use_running_average=True, **_AFFINE, inputs=(lambda: normal(8, 3),)
            ),
        },
        operations={normalize_and_activate: "masked"},
        workloads={"32x32x32x128": made(128, inputs=(lambda: normal(32, 32, 32, 128),))},
    ),
    Entry(
        "Reversible",
        "invertible",
        Reversible,
        None,
        "exact",
        keeps="the output of the last block, the parameters",
        gain="memory that does not grow with the number of blocks, for one more forward",
        source="arXiv:1707.04585",
        # Two: each rounds what it finds, and three in bfloat16 more than is checked for.
        examples={"blocks": _list_of_blocks, "stacked": _stack(2, 8, 6)},
        operations={reversible: "blocks"},
        workloads={"8 blocks of 4096x512": _stack(8, 4096, 512)},
    ),
)
