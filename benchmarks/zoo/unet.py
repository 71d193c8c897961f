"""A UNet that denoises images: GroupNorm and silu, and ConvTranspose on the way up.

Source: arXiv:1505.04597
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, images


class Block(nnx.Module):
    """Two convolutions with GroupNorm, to which the projected input is added."""

    def __init__(self, features_in: int, features: int, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(features_in, 4, rngs=rngs)
        self.conv1 = nnx.Conv(features_in, features, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(features, 4, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.projection = nnx.Conv(features_in, features, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, height, width, features_in)."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return self.projection(x) + y


class UNet(nnx.Module):
    """Blocks down, a block at the bottom, and up again, each joined by what went down."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, widths[0], (3, 3), rngs=rngs)
        pairs = list(itertools.pairwise(widths))
        self.down = nnx.List([Block(a, a, rngs) for a, _ in pairs])
        self.halve = nnx.List([nnx.Conv(a, b, (3, 3), 2, rngs=rngs) for a, b in pairs])
        self.bottom = Block(widths[-1], widths[-1], rngs)
        pairs = pairs[::-1]
        self.double = nnx.List([nnx.ConvTranspose(b, a, (2, 2), 2, rngs=rngs) for a, b in pairs])
        self.up = nnx.List([Block(2 * a, a, rngs) for a, _ in pairs])
        self.head = nnx.Conv(widths[0], 3, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The noise in images of shape (batch, height, width, 3)."""
        x, skipped = self.stem(x), []
        for block, halve in zip(self.down, self.halve, strict=True):
            x = block(x)
            skipped.append(x)
            x = halve(x)
        x = self.bottom(x)
        for double, block in zip(self.double, self.up, strict=True):
            x = block(jnp.concatenate([double(x), skipped.pop()], axis=-1))
        return self.head(x)


def task(tiny: bool = False) -> Task:
    """Images of 32 x 32 pixels, whose noise is predicted."""
    widths, batch, pixels = ((8, 16), 2, 8) if tiny else ((16, 32, 64), 8, 32)
    x = images(batch, pixels)
    return Task(UNet(widths, nnx.Rngs(0)), x, lambda y: jnp.mean((y - x) ** 2))
