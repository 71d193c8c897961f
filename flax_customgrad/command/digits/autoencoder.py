"""An autoencoder of the digits with a codebook in its middle, and how much of it is used."""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.command.digits import data
from flax_customgrad.command.digits.fit import fit
from flax_customgrad.estimators.codebook.usage import Quantized
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer
from flax_customgrad.layers.linear.linear import Linear

CODES = 256
"""How many codes there are; an image becomes four of them."""

_HIDDEN, _VECTORS, _SIZE = 128, 4, 8

CODEBOOKS: dict[str, dict[str, Any]] = {
    "straight-through, loss": {},
    "rotation trick, loss": {"gradient": "rotation"},
    "straight-through, moving average": {"learning": "ema", "decay": 0.9},
    "rotation trick, moving average": {"gradient": "rotation", "learning": "ema", "decay": 0.9},
    "the same, dead codes reset": {
        "gradient": "rotation",
        "learning": "ema",
        "decay": 0.9,
        "dead_below": 0.1,
    },
}
"""How codebooks are learned, by name: the arguments of a `VectorQuantizer`."""


class Autoencoder(nnx.Module):
    """A network from an image to four codes, and back."""

    def __init__(self, rngs: nnx.Rngs, **kwargs: Any):
        self.encoder = nnx.Sequential(
            Linear(data.PIXELS, _HIDDEN, rngs=rngs),
            nnx.relu,
            Linear(_HIDDEN, _VECTORS * _SIZE, rngs=rngs),
        )
        self.codes = VectorQuantizer(CODES, _SIZE, rngs=rngs, **kwargs)
        self.decoder = nnx.Sequential(
            Linear(_VECTORS * _SIZE, _HIDDEN, rngs=rngs),
            nnx.relu,
            Linear(_HIDDEN, data.PIXELS, rngs=rngs),
        )

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, Quantized]:
        """Returns the image as it comes back, and its codes.

        Args:
            pixels: array of shape (n, 64).
        """
        z = einops.rearrange(self.encoder(pixels), "n (v d) -> n v d", v=_VECTORS)
        codes = self.codes(z)
        return self.decoder(einops.rearrange(codes.values, "n v d -> n (v d)")), codes


class AutoencoderResult(NamedTuple):
    """How well autoencoders do on the test images; arrays with a value for each seed.

    Attributes:
        error: the mean squared error of a pixel, relative to the variance of the pixels.
        usage: the share of codes used.
        perplexity: exp of the entropy of the codes.
    """

    error: np.ndarray
    usage: np.ndarray
    perplexity: np.ndarray


def train(arguments: dict[str, Any], seeds: int, steps: int) -> AutoencoderResult:
    """Trains autoencoders, one for each seed.

    Args:
        arguments: of the `VectorQuantizer`.
        seeds: how many; each splits the data anew.
        steps: how many steps of 64 images.
    """
    batches = data.load_seeds(seeds)
    one = functools.partial(_train_seed, arguments, steps)
    return AutoencoderResult(*map(np.asarray, jax.jit(jax.vmap(one))(jnp.arange(seeds), *batches)))


def _train_seed(
    arguments: dict[str, Any], steps: int, seed: jax.Array, train: data.Batch, test: data.Batch
) -> tuple[jax.Array, ...]:
    rngs = nnx.Rngs(jax.random.key(seed))

    def loss(network: Autoencoder, batch: data.Batch) -> jax.Array:
        pixels = data.flatten(batch.images)
        decoded, codes = network(pixels)
        return jnp.square(decoded - pixels).mean() / pixels.var() + codes.loss

    network = fit(Autoencoder(rngs, **arguments), loss, train, steps, rngs())
    network.eval()
    pixels = data.flatten(test.images)
    decoded, codes = network(pixels)
    assert codes.usage is not None
    assert codes.perplexity is not None
    return jnp.square(decoded - pixels).mean() / pixels.var(), codes.usage, codes.perplexity
