"""A vision transformer: patches of 16 x 16 pixels, attention with heads, LayerNorm and gelu.

Source: arXiv:2010.11929
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, images, integers


class Block(nnx.Module):
    """Attention and a feed-forward network, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, patches, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    """Patches with positions, blocks, and a classifier of their mean."""

    def __init__(
        self, width: int, depth: int, heads: int, n_patches: int, classes: int, rngs: nnx.Rngs
    ):
        self.patches = nnx.Conv(3, width, (16, 16), 16, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (n_patches, width)))
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Classifies images of shape (batch, height, width, 3)."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


def task(tiny: bool = False) -> Task:
    """Images of 224 x 224 pixels in ten classes."""
    width, depth, heads, batch, side = (16, 1, 2, 2, 2) if tiny else (192, 6, 3, 2, 14)
    model = ViT(width, depth, heads, side**2, 10, nnx.Rngs(0))
    return Task(model, images(batch, 16 * side), cross_entropy(integers(batch, below=10)))
