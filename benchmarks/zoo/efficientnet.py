"""An EfficientNet: depthwise convolutions of many shapes, BatchNorm, swish, and gates of features.

Source: arXiv:1905.11946
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, images, integers


class Gate(nnx.Module):
    """Squeeze and excitation: each feature times a number that depends on the means of all."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.squeeze = nnx.Conv(features, features // 4, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(features // 4, features, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x`, of shape (batch, height, width, features)."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.excite(nnx.swish(self.squeeze(means))))


class Block(nnx.Module):
    """An inverted bottleneck: widened by 1 x 1, filtered by a depthwise convolution, narrowed."""

    def __init__(self, features_in: int, features: int, window: int, stride: int, rngs: nnx.Rngs):
        wide = 4 * features_in
        plain = {"use_bias": False, "rngs": rngs}
        self.up = nnx.Conv(features_in, wide, (1, 1), **plain)
        self.norm1 = nnx.BatchNorm(wide, rngs=rngs)
        self.conv = nnx.Conv(
            wide, wide, (window, window), stride, feature_group_count=wide, **plain
        )
        self.norm2 = nnx.BatchNorm(wide, rngs=rngs)
        self.gate = Gate(wide, rngs)
        self.down = nnx.Conv(wide, features, (1, 1), **plain)
        self.norm3 = nnx.BatchNorm(features, rngs=rngs)
        self.is_added = stride == 1 and features_in == features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, height, width, features)."""
        y = nnx.swish(self.norm1(self.up(x)))
        y = self.gate(nnx.swish(self.norm2(self.conv(y))))
        y = self.norm3(self.down(y))
        return x + y if self.is_added else y


class EfficientNet(nnx.Module):
    """A strided convolution, blocks of windows and strides of their own, and a classifier."""

    def __init__(self, stages: tuple[tuple[int, int, int], ...], classes: int, rngs: nnx.Rngs):
        features_in = stages[0][0]
        self.stem = nnx.Conv(3, features_in, (3, 3), 2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features_in, rngs=rngs)
        blocks = []
        for features, window, stride in stages:
            blocks.append(Block(features_in, features, window, stride, rngs))
            features_in = features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features_in, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Classifies images of shape (batch, height, width, 3)."""
        x = nnx.swish(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def task(tiny: bool = False) -> Task:
    """Images of 64 x 64 pixels in ten classes."""
    stages = (16, 3, 1), (24, 3, 2), (24, 3, 1), (40, 5, 2), (40, 5, 1), (80, 3, 2), (80, 3, 1)
    small = (4, 5, 2), (4, 3, 1)
    stages, batch, pixels = (small, 4, 16) if tiny else (stages, 16, 64)
    model = EfficientNet(stages, 10, nnx.Rngs(0))
    return Task(model, images(batch, pixels), cross_entropy(integers(batch, below=10)))
