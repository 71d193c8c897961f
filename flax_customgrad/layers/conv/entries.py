"""The catalogue's entries of the convolutions; the examples cover every lowering."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose
from flax_customgrad.layers.conv.convolution import convolution
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal

_KEEPS = "x without its padding, kernel"


def _images(shape: tuple[int, ...], *args: Any, dtype: Any = jnp.float32, **kwargs: Any) -> Example:
    """An example of a layer with one kernel on images of a shape."""
    if dtype != jnp.float32:
        kwargs["dtype"] = dtype
    return made(shape[-1], *args, **kwargs, inputs=(lambda: normal(*shape, dtype=dtype),))


# Leaves out every fifth weight of a kernel of 2 x 3, with 2 features in and 6 out.
_MASK = (np.arange(2 * 3 * 2 * 6) % 5 > 0).reshape(2, 3, 2, 6).astype(np.float32)
# Leaves out every fourth weight of a kernel of 5, with 2 features in and 3 out.
_MASK_1D = (np.arange(5 * 2 * 3) % 4 > 0).reshape(5, 2, 3).astype(np.float32)

ENTRIES = (
    Entry(
        "Conv",
        "conv",
        Conv,
        nnx.Conv,
        "exact",
        keeps=_KEEPS,
        gain="2 to 150 times as fast on a CPU unless dense; float32 sums; no padding kept",
        source="https://github.com/jax-ml/jax/issues/13800",
        examples={
            "depthwise, causal, bias": _images(
                (8, 5, 2), 4, 3, padding="CAUSAL", feature_group_count=2, **RANDOM_BIAS
            ),
            "circular, groups, mask, strides, kernel dilation, bias": _images(
                (8, 1, 3, 5, 4),
                6,
                (2, 3),
                strides=(2, 1),
                padding="CIRCULAR",
                kernel_dilation=(1, 2),
                feature_group_count=2,
                mask=_MASK,
                **RANDOM_BIAS,
            ),
            "dense, reflected": _images((8, 3, 4, 2), 3, (2, 3), padding="REFLECT"),
            "patches": _images((8, 5, 4, 2), 3, (2, 2), strides=2, padding="SAME"),
            "strides and input dilation at once": _images(
                (8, 4, 2), 3, 3, strides=2, padding=[(1, 2)], input_dilation=3
            ),
        },
        operations={convolution: "circular, groups, mask, strides, kernel dilation, bias"},
        workloads={
            "3x3, 16x32x32x128": _images((16, 32, 32, 128), 128, (3, 3)),
            "7x7 stride 2, 8x224x224x3 to 64": _images((8, 224, 224, 3), 64, (7, 7), 2),
            "3x3 dilated, 16x32x32x128": _images((16, 32, 32, 128), 128, (3, 3), kernel_dilation=2),
            "1-D, 8x1024x256": _images((8, 1024, 256), 256, 3, padding="CAUSAL"),
            "3x3 stride 2, 16x32x32x128 to 256": _images((16, 32, 32, 128), 256, (3, 3), 2),
            "1x1, 16x32x32x256": _images((16, 32, 32, 256), 256, (1, 1)),
            "1x1 stride 2, 16x32x32x256 to 512": _images((16, 32, 32, 256), 512, (1, 1), 2),
            "16x16 patches, 8x224x224x3 to 768": _images((8, 224, 224, 3), 768, (16, 16), 16),
            "3x3 depthwise, 16x32x32x128": _images(
                (16, 32, 32, 128), 128, (3, 3), feature_group_count=128
            ),
            "7x7 depthwise, 16x28x28x128": _images(
                (16, 28, 28, 128), 128, (7, 7), feature_group_count=128
            ),
            "3x3 depthwise stride 2, 16x32x32x128": _images(
                (16, 32, 32, 128), 128, (3, 3), 2, feature_group_count=128
            ),
            "1-D depthwise, 8x1024x512": _images(
                (8, 1024, 512), 512, 4, padding="CAUSAL", feature_group_count=512
            ),
            "3x3 in 32 groups, 16x28x28x128": _images(
                (16, 28, 28, 128), 128, (3, 3), feature_group_count=32
            ),
            "3x3 in 4 groups, 16x28x28x128": _images(
                (16, 28, 28, 128), 128, (3, 3), feature_group_count=4
            ),
            "3x3 depthwise, 16x32x32x128, bf16": _images(
                (16, 32, 32, 128), 128, (3, 3), feature_group_count=128, dtype=jnp.bfloat16
            ),
            "1x1, 16x32x32x256, bf16": _images((16, 32, 32, 256), 256, (1, 1), dtype=jnp.bfloat16),
        },
    ),
    Entry(
        "ConvTranspose",
        "conv",
        ConvTranspose,
        nnx.ConvTranspose,
        "exact",
        keeps=_KEEPS,
        gain="4 to 24 times as fast on a CPU where strided; float32 sums",
        source="https://github.com/jax-ml/jax/issues/31662",
        examples={
            "phases, bias": _images((8, 3, 4, 2), 3, (3, 2), strides=2, **RANDOM_BIAS),
            "no overlap, mirrored": _images(
                (8, 3, 2), 3, 2, strides=2, padding="VALID", transpose_kernel=True
            ),
            "circular, mask": _images(
                (8, 3, 2), 3, 5, strides=2, padding="CIRCULAR", use_bias=False, mask=_MASK_1D
            ),
        },
        workloads={
            "4x4 stride 2, 16x16x16x128 to 64": _images((16, 16, 16, 128), 64, (4, 4), 2),
            "2x2 stride 2, 8x32x32x256 to 128": _images((8, 32, 32, 256), 128, (2, 2), 2),
            "3x3 stride 2, 16x16x16x128": _images((16, 16, 16, 128), 128, (3, 3), 2),
        },
    ),
)
