"""A decoder of text: RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Source: arXiv:2307.09288
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, integers


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions: pairs of features are turned by angles that grow along the text.

    Args:
        x: array of shape (batch, length, heads, features), float.
    """
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
    """Causal attention in which several heads of queries share one of keys and values."""

    def __init__(self, width: int, heads: int, shared_heads: int, rngs: nnx.Rngs):
        features = width // heads
        projection = {"use_bias": False, "rngs": rngs}
        self.q = nnx.LinearGeneral(width, (heads, features), **projection)
        self.k = nnx.LinearGeneral(width, (shared_heads, features), **projection)
        self.v = nnx.LinearGeneral(width, (shared_heads, features), **projection)
        self.out = nnx.LinearGeneral((heads, features), width, axis=(-2, -1), **projection)
        self.copies = heads // shared_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends within `x`, of shape (batch, length, width)."""
        q, k, v = rotated(self.q(x)), rotated(self.k(x)), self.v(x)
        k, v = (jnp.repeat(array, self.copies, axis=2) for array in (k, v))
        return self.out(nnx.dot_product_attention(q, k, v, is_causal=True))


class Block(nnx.Module):
    """Attention and a gated feed-forward network, each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, shared_heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, shared_heads, rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(3 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, length, width)."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Predicts each token from those before; the embedding is the output layer as well."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, heads // 2, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of `tokens`, of shape (batch, length), int32."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def task(tiny: bool = False) -> Task:
    """Texts of 128 tokens."""
    width, depth, batch, length = (16, 1, 2, 8) if tiny else (192, 4, 4, 128)
    tokens = integers(batch, length, below=256)
    model = Decoder(256, width, depth, 4, nnx.Rngs(0))
    return Task(model, tokens, cross_entropy(jnp.roll(tokens, -1, axis=1)))
