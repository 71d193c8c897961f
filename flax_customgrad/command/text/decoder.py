"""The network of the task `text`: a decoder of two blocks, all of its layers of flax.nnx."""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.command.text import excerpts

_BYTES, _WIDTH, _HIDDEN, _HEADS, _BLOCKS = 256, 64, 128, 4, 2


class SwiGLU(nnx.Module):
    """A linear layer whose inputs are gated by another one."""

    def __init__(self, rngs: nnx.Rngs):
        self.gate = nnx.Linear(_WIDTH, _HIDDEN, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(_WIDTH, _HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(_HIDDEN, _WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to an array of shape (n, length, width)."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention to the bytes before, and a gated layer, each after a normalization."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm_1 = nnx.RMSNorm(_WIDTH, rngs=rngs)
        # The gradient of a bias of the keys is zero: what is left of it is rounding.
        self.attn = nnx.MultiHeadAttention(_HEADS, _WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.norm_2 = nnx.RMSNorm(_WIDTH, rngs=rngs)
        self.mlp = SwiGLU(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to an array of shape (n, length, width)."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attn(self.norm_1(x), mask=mask)
        return x + self.mlp(self.norm_2(x))


class Decoder(nnx.Module):
    """A network from bytes to logits for the byte after each."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(_BYTES, _WIDTH, rngs=rngs)
        self.position = nnx.Embed(excerpts.LENGTH, _WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(_BLOCKS)])
        self.norm = nnx.RMSNorm(_WIDTH, rngs=rngs)
        self.head = nnx.Linear(_WIDTH, _BYTES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Applies the network.

        Args:
            tokens: bytes, int32 of shape (n, length), a length of at most 64.

        Returns:
            Logits of shape (n, length, 256).
        """
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
