"""gumbel_softmax: a sample from a categorical distribution, with the gradient of a softmax.

    forward   z = logits + noise                           standard Gumbel noise
              p = softmax(z / temperature)
              soft  y = p
              hard  y = 1 for the largest of z, 0 elsewhere: a sample from softmax(logits)
    backward  dlogits      = J(p) g / temperature,  J(p) g = p (g - sum p g)
              dtemperature = -sum dlogits log(p)
              exact for the soft sample, straight-through for the hard one
    kept      p, from which `temperature_softmax` computes both. Drawing the noise again from its
              key would keep the logits instead, and cost a second draw.
    at a tie  the lower index wins

With w = z / temperature and the derivative of a softmax, p (g - sum p g):

    dlogits      = J(p) g ∂w/∂z = J(p) g / temperature
    dtemperature = sum J(p) g ∂w/∂temperature = -sum J(p) g z / temperature^2
                 = -sum dlogits z / temperature
                 = -sum dlogits log(p)          log(p) is w minus one number, and sum dlogits = 0

This page has the soft sample; the hard one is `top_k` with k = 1. Its forward is exactly zeros and
ones; `y_hard + y_soft - stop_gradient(y_soft)`, as it is also written, is not after rounding. Half
precision is computed in float32.

Source: arXiv:1611.01144
"""

from typing import Any, NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.categorical.perturbed_logits import (
    check_logits_and_temperature,
    gumbel_noise,
    perturb,
)
from flax_customgrad.estimators.categorical.sampler import Sampler
from flax_customgrad.estimators.categorical.temperature_softmax import (
    softmax_at_temperature,
    softmax_gradients,
)
from flax_customgrad.estimators.categorical.top_k import top_k


class Residuals(NamedTuple):
    """What the backward of `soft_sample` keeps: `p`, its output."""

    p: jax.Array
    temperature: Any
    axis: int


@custom_vjp
def soft_sample(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, axis: int
) -> jax.Array:
    """The softmax of perturbed logits.

    Args:
        logits: array of any shape, float.
        temperature: a number, or a floating array that broadcasts against a row.
        noise: array like logits, which is added to them first; None for none. It has no gradient.
        axis: the axis of the classes.

    Returns:
        Array like logits.
    """
    z = perturb(logits, noise)
    return softmax_at_temperature(z, temperature, axis).astype(logits.dtype)


def _fwd(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, axis: int
) -> tuple[jax.Array, Residuals]:
    p = soft_sample(logits, temperature, noise, axis)
    return p, Residuals(p, temperature, axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    chex.assert_equal_shape([res.p, g])
    dlogits, dtemperature = softmax_gradients(res.p, g, res.temperature, res.axis)
    chex.assert_equal_shape([dlogits, g])
    if dtemperature is not None:
        chex.assert_equal_shape([dtemperature, res.temperature])
    return dlogits, dtemperature, None, None


soft_sample.defvjp(_fwd, _bwd)


def gumbel_softmax(
    logits: jax.Array,
    key: jax.Array | None,
    temperature: Any = 1.0,
    *,
    hard: bool = True,
    axis: int = -1,
) -> jax.Array:
    """A sample from softmax(logits) that a gradient passes through.

    Args:
        logits: array of any shape, float; -inf masks a class, which has probability and gradient 0.
        key: a key for the noise; None for none, which chooses the largest logit.
        temperature: a number, or an array (which may be traced and gets a gradient) that
            broadcasts against the logits and has size 1 along the axis. A traced one is not
            checked.
        hard: whether the sample is one-hot, with the gradient of the soft one; a soft sample is a
            point of the simplex, with its exact gradient.
        axis: the axis of the classes.

    Returns:
        Array like logits that adds up to 1 along the axis. The same key gives the same noise in
        every dtype. A traced row without a largest logit, because it holds NaN, infinity or
        nothing but -inf, is NaN.

    Raises:
        TypeError: the logits are not floating.
        ValueError: there is no class; a row holds NaN, infinity or nothing but -inf; the
            temperature is not positive and finite, or has a wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
        >>> fcg.gumbel_softmax(logits, jax.random.key(1))
        Array([0., 0., 1.], dtype=float32)
        >>> many = fcg.gumbel_softmax(jnp.tile(logits, (100_000, 1)), jax.random.key(1))
        >>> [round(float(share), 2) for share in many.mean(0)]
        [0.1, 0.2, 0.7]

    Source: arXiv:1611.01144
    """
    logits, temperature = check_logits_and_temperature("gumbel_softmax", logits, temperature, axis)
    noise = gumbel_noise(key, logits)
    if hard:
        return top_k(logits, temperature, noise, 1, axis)
    return soft_sample(logits, temperature, noise, axis)


class GumbelSoftmax(Sampler):
    """`gumbel_softmax` as a layer, with keys of its own.

    Attributes:
        temperature: a number, an array or a Variable.
        hard: whether samples are one-hot.
        axis: the axis of the classes.
        deterministic: if true, there is no noise: a hard sample is the largest logit, a soft one
            the softmax at the temperature.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.GumbelSoftmax(0.5, rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((100, 3))).sum(0)
        Array([..., dtype=float32)
        >>> layer.eval()
        >>> layer(jnp.array([0.0, 2.0, 1.0]))
        Array([0., 1., 0.], dtype=float32)

    Source: arXiv:1611.01144
    """

    def __init__(
        self,
        temperature: Any = 1.0,
        *,
        hard: bool = True,
        axis: int = -1,
        deterministic: bool | None = False,
        rng_collection: str = "sample",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        """Makes the layer; it has no parameters of its own.

        Args:
            temperature: as for `gumbel_softmax`; an `nnx.Param` is learned.
            hard: whether samples are one-hot.
            axis: the axis of the classes.
            deterministic: if true, there is no noise; `model.eval()` sets it.
            rng_collection: the stream of `rngs` that the keys of samples come from.
            rngs: random numbers for the samples.

        Raises:
            ValueError: the temperature is not positive and finite.
        """
        super().__init__(temperature, axis, deterministic, rng_collection, rngs)
        self.hard = hard

    def _choose(self, logits: jax.Array, key: jax.Array | None, temperature: Any) -> jax.Array:
        return gumbel_softmax(logits, key, temperature, hard=self.hard, axis=self.axis)
