"""A language model of state spaces: a diagonal recurrence over time in the place of attention.

    h_t = a_t h_{t-1} + (1 - a_t) b_t,   y_t = h_t silu(gate_t)

The decay a_t is a function of the input, as in a selective state space, and the recurrence is an
associative scan. A short causal convolution goes before it.

Source: arXiv:2312.00752
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, integers


class Mixer(nnx.Module):
    """A gated recurrence over time, behind a causal convolution of each feature."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.into = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(
            width, width, (4,), padding="CAUSAL", feature_group_count=width, rngs=rngs
        )
        self.decay = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes `x`, of shape (batch, length, width), along its length."""
        b, gate = jnp.split(self.into(x), 2, axis=-1)
        b = nnx.silu(self.conv(b))
        a = nnx.sigmoid(self.decay(b))

        def after(first, second):
            (a1, h1), (a2, h2) = first, second
            return a1 * a2, a2 * h1 + h2

        _, h = jax.lax.associative_scan(after, (a, (1 - a) * b), axis=1)
        return self.out(h * nnx.silu(gate))


class Block(nnx.Module):
    """A mixer over time and a feed-forward network, each behind an RMSNorm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.mixer = Mixer(width, rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, length, width)."""
        x = x + self.mixer(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class SSM(nnx.Module):
    """Predicts each token from those before."""

    def __init__(self, vocabulary: int, width: int, depth: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of `tokens`, of shape (batch, length), int32."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def task(tiny: bool = False) -> Task:
    """Texts of 256 tokens."""
    width, depth, batch, length = (16, 1, 2, 8) if tiny else (128, 4, 4, 256)
    tokens = integers(batch, length, below=256)
    model = SSM(256, width, depth, nnx.Rngs(0))
    return Task(model, tokens, cross_entropy(jnp.roll(tokens, -1, axis=1)))
