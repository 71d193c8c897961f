"""A mixer: feed-forward networks over features and over patches, each behind a LayerNorm.

It has more than 4096 rows, from where on XLA on a CPU fuses layers with those around them.

Source: arXiv:2105.01601
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, images, integers


class FeedForward(nnx.Module):
    """Two Linears with gelu between them."""

    def __init__(self, width: int, wide: int, rngs: nnx.Rngs, use_bias: bool = True):
        self.up = nnx.Linear(width, wide, rngs=rngs)
        self.down = nnx.Linear(wide, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies it to the last axis of `x`."""
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """Mixes patches, then features."""

    def __init__(self, width: int, n_patches: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        # A bias for each patch, the same for all features, every LayerNorm would take out again.
        self.patches = FeedForward(n_patches, 2 * n_patches, rngs, use_bias=False)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.features = FeedForward(width, 4 * width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, patches, width)."""
        mixed = self.patches(self.norm1(x).swapaxes(1, 2))
        x = x + mixed.swapaxes(1, 2)
        return x + self.features(self.norm2(x))


class Mixer(nnx.Module):
    """Patches of 16 x 16 pixels, blocks, and a classifier of their mean."""

    def __init__(self, width: int, depth: int, n_patches: int, classes: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, width, (16, 16), 16, rngs=rngs)
        self.blocks = nnx.List([Block(width, n_patches, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Classifies images of shape (batch, height, width, 3)."""
        x = self.stem(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


def task(tiny: bool = False) -> Task:
    """Images of 224 x 224 pixels in ten classes."""
    width, depth, batch, side = (16, 1, 2, 2) if tiny else (192, 3, 24, 14)
    model = Mixer(width, depth, side**2, 10, nnx.Rngs(0))
    return Task(model, images(batch, 16 * side), cross_entropy(integers(batch, below=10)))
