"""The catalogue's entries of the normalization family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.normalization.batch_norm import BatchNorm, normalize_by
from flax_customgrad.layers.normalization.group_norm import GroupNorm
from flax_customgrad.layers.normalization.instance_norm import InstanceNorm
from flax_customgrad.layers.normalization.layer_norm import LayerNorm
from flax_customgrad.layers.normalization.normalize import normalize
from flax_customgrad.layers.normalization.rms_norm import RMSNorm
from flax_customgrad.layers.normalization.standardize import standardize
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import applied, made, normal

_BF16: dict[str, Any] = {"dtype": jnp.bfloat16}
_SCALED: dict[str, Any] = {"scale_init": nnx.initializers.normal(1.0)}
_AFFINE: dict[str, Any] = {**_SCALED, "bias_init": nnx.initializers.normal(1.0)}
_KEEPS = "x, scale, and three numbers per statistic (residual='output': y in the place of x)"
_GAIN = "no float32 arrays of x's size kept; float32 sums; exact for a large mean and huge values"


def _masked(layer: Any, x: jax.Array) -> jax.Array:
    """Calls a layer with a mask that leaves some elements of each statistic out."""
    return layer(x, mask=jnp.arange(x.size).reshape(x.shape) % 5 != 0)


def _evaluation(cls: Any) -> tuple[Any, ...]:
    """A layer that normalizes by statistics which are not those of the input."""
    layer = cls(3, axis=1, use_running_average=True, **_AFFINE, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([0.25, -0.5, 1.0])
    layer.var[...] = jnp.array([0.5, 1.5, 2.0])
    return layer, normal(8, 3, 1, 2)


def _images(dtype: Any = jnp.float32) -> jax.Array:
    return normal(32, 32, 32, 128, dtype=dtype)


_OF_FEATURES = {
    "4096x1024": made(1024, inputs=(lambda: normal(4096, 1024),)),
    "4096x1024, bf16": made(
        1024, **_BF16, inputs=(lambda: normal(4096, 1024, dtype=jnp.bfloat16),)
    ),
    "8x64": made(64, inputs=(lambda: normal(8, 64),)),
}
_OF_IMAGES = {
    "32x32x32x128": made(128, inputs=(_images,)),
    "32x32x32x128, bf16": made(128, **_BF16, inputs=(lambda: _images(jnp.bfloat16),)),
}

ENTRIES = (
    Entry(
        "LayerNorm",
        "normalization",
        LayerNorm,
        nnx.LayerNorm,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN,
        source="arXiv:1607.06450",
        examples={
            "features": made(6, **_AFFINE, inputs=(lambda: normal(8, 6),)),
            "features reduced or not, of size 1, masked": made(
                4,
                reduction_axes=(1, 3),
                feature_axes=(1, 2),
                call=_masked,
                **_AFFINE,
                inputs=(lambda: normal(8, 4, 1, 3),),
            ),
        },
        operations={normalize: "features reduced or not, of size 1, masked"},
        workloads=_OF_FEATURES,
    ),
    Entry(
        "RMSNorm",
        "normalization",
        RMSNorm,
        nnx.RMSNorm,
        "exact",
        keeps=_KEEPS.replace("three numbers", "a number"),
        gain=_GAIN.replace("a large mean and ", ""),
        source="arXiv:1910.07467",
        examples={
            "masked": made(6, call=_masked, **_SCALED, inputs=(lambda: normal(8, 2, 6),)),
        },
        workloads=_OF_FEATURES,
    ),
    Entry(
        "GroupNorm",
        "normalization",
        GroupNorm,
        nnx.GroupNorm,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN + "; any reduction_axes",
        source="arXiv:1803.08494",
        examples={
            "two groups, an axis of size 1, masked": made(
                6, 2, call=_masked, **_AFFINE, inputs=(lambda: normal(8, 3, 1, 6),)
            ),
        },
        workloads=_OF_IMAGES,
    ),
    Entry(
        "InstanceNorm",
        "normalization",
        InstanceNorm,
        nnx.InstanceNorm,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN,
        source="arXiv:1607.08022",
        examples={
            "images, an axis of size 1, masked": made(
                2, call=_masked, **_AFFINE, inputs=(lambda: normal(8, 4, 1, 2),)
            ),
        },
        workloads=_OF_IMAGES,
    ),
    Entry(
        "BatchNorm",
        "normalization",
        BatchNorm,
        nnx.BatchNorm,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN + "; running statistics survive a masked batch",
        source="arXiv:1502.03167",
        examples={
            "training, masked": made(3, call=_masked, **_AFFINE, inputs=(lambda: normal(8, 2, 3),)),
            "evaluation, features in the middle, an axis of size 1": _evaluation,
        },
        operations={normalize_by: "evaluation, features in the middle, an axis of size 1"},
        workloads=_OF_IMAGES,
    ),
    Entry(
        "standardize",
        "normalization",
        standardize,
        nnx.standardize,
        "exact",
        keeps="x, and three numbers per statistic",
        gain=_GAIN,
        examples={"features": applied(lambda: normal(8, 6))},
        workloads={"4096x1024": applied(lambda: normal(4096, 1024))},
    ),
)
