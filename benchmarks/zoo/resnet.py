"""A residual network for small images: blocks of two 3 x 3 convolutions with BatchNorm.

Source: arXiv:1512.03385
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, images, integers


class Block(nnx.Module):
    """Two convolutions around which the input goes; a projection where the shape changes."""

    def __init__(self, features_in: int, features: int, stride: int, rngs: nnx.Rngs):
        conv = {"use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(features_in, features, (3, 3), stride, **conv)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), **conv)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.projection = (
            nnx.Conv(features_in, features, (1, 1), stride, **conv)
            if stride > 1 or features_in != features
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, height, width, features_in)."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.projection is None else self.projection(x)))


class ResNet(nnx.Module):
    """A stem, stages of blocks that halve the image, and a classifier of the mean."""

    def __init__(self, widths: tuple[int, ...], depth: int, classes: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(widths[0], rngs=rngs)
        blocks, features_in = [], widths[0]
        for stage, features in enumerate(widths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(features_in, features, stride, rngs))
                features_in = features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features_in, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Classifies images of shape (batch, height, width, 3)."""
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def task(tiny: bool = False) -> Task:
    """Images of 32 x 32 pixels in ten classes."""
    widths, depth, batch, pixels = ((4, 8), 1, 2, 8) if tiny else ((16, 32, 64), 2, 16, 32)
    model = ResNet(widths, depth, 10, nnx.Rngs(0))
    return Task(model, images(batch, pixels), cross_entropy(integers(batch, below=10)))
