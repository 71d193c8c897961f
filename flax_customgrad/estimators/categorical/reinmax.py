"""reinmax: a categorical sample with a gradient of second order.

    forward   y       = a one-hot sample from p0 = softmax(logits), at temperature 1
    backward  p1      = (y + softmax(logits / temperature)) / 2
              dlogits = 2 J(p1) g - J(p0) g / 2,  J(p) g = p (g - sum p g)
    kept      logits and temperature, which the caller holds, and sample, the index of the 1 in y
    at a tie  the lower index wins

The straight-through estimator is a first-order approximation of the gradient of the expected loss;
this one is Heun's method, of second order. Nothing is divided by the temperature, which shapes `p1`
alone and has no gradient: it belongs to the estimator, not to the forward. The paper recommends a
temperature of 1 or more. Half precision is computed in float32.

Source: arXiv:2304.08612
"""

from typing import Any, NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.categorical.k_hot import index_of_largest, k_hot, mask_at
from flax_customgrad.estimators.categorical.perturbed_logits import (
    check_logits_and_temperature,
    gumbel_noise,
    perturb,
)
from flax_customgrad.estimators.categorical.sampler import Sampler
from flax_customgrad.estimators.categorical.temperature_softmax import (
    softmax_at_temperature,
    softmax_jacobian_product,
)
from flax_customgrad.numerics.accumulation import accumulator


class Residuals(NamedTuple):
    """What the backward of `one_hot_sample` keeps: a number a row, and what the caller holds."""

    logits: jax.Array
    temperature: Any
    sample: jax.Array
    axis: int


@custom_vjp(surrogate=True)
def one_hot_sample(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, axis: int
) -> jax.Array:
    """The largest of perturbed logits.

    Args:
        logits: array of any shape, float.
        temperature: temperature of the backward; a number, or a floating array that broadcasts
            against a row.
        noise: array like logits, which is added to them first; None for none.
        axis: the axis of the classes.

    Returns:
        Array like logits, of zeros and ones.
    """
    return k_hot(perturb(logits, noise), 1, axis).astype(logits.dtype)


def _fwd(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, axis: int
) -> tuple[jax.Array, Residuals]:
    y = one_hot_sample(logits, temperature, noise, axis)
    return y, Residuals(logits, temperature, index_of_largest(y, axis), axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    logits, axis = res.logits, res.axis
    chex.assert_equal_shape([logits, g])
    chex.assert_type(res.sample, int)
    dtype = accumulator(logits)
    logits, g = logits.astype(dtype), g.astype(dtype)
    y = mask_at(res.sample, logits.shape, axis).astype(dtype)
    p0 = softmax_at_temperature(logits, 1, axis)
    p1 = (y + softmax_at_temperature(logits, res.temperature, axis)) / 2
    of_p0, of_p1 = (softmax_jacobian_product(p, g, axis) for p in (p0, p1))
    dlogits = 2 * of_p1 - of_p0 / 2
    chex.assert_equal_shape([dlogits, y, p0, p1, g])
    return dlogits, None, None, None


one_hot_sample.defvjp(_fwd, _bwd)


def reinmax(
    logits: jax.Array, key: jax.Array | None, temperature: Any = 1.0, *, axis: int = -1
) -> jax.Array:
    """A one-hot sample from softmax(logits), with the gradient of ReinMax.

    Args:
        logits: array of any shape, float; -inf masks a class, which has probability and gradient 0.
        key: a key for the sample; None chooses the largest logit.
        temperature: of the backward; a number, or an array, which may be traced, that broadcasts
            against the logits and has size 1 along the axis. It gets no gradient. A traced one is
            not checked.
        axis: the axis of the classes.

    Returns:
        Array like logits with a single 1 in each row. A traced row without a largest logit,
        because it holds NaN, infinity or nothing but -inf, is NaN.

    Raises:
        TypeError: the logits are not floating.
        ValueError: there is no class; a row holds NaN, infinity or nothing but -inf; the
            temperature is not positive and finite, or has a wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> logits, key = jnp.log(jnp.array([0.25, 0.25, 0.5])), jax.random.key(1)
        >>> fcg.reinmax(logits, key)
        Array([0., 0., 1.], dtype=float32)
        >>> jax.grad(lambda logits: fcg.reinmax(logits, key)[2])(logits).round(4)
        Array([-0.125, -0.125,  0.25 ], dtype=float32)

    Source: arXiv:2304.08612
    """
    logits, temperature = check_logits_and_temperature("reinmax", logits, temperature, axis)
    return one_hot_sample(logits, temperature, gumbel_noise(key, logits), axis)


class ReinMax(Sampler):
    """`reinmax` as a layer, with keys of its own.

    Attributes:
        temperature: of the backward; a number, an array or a Variable.
        axis: the axis of the classes.
        deterministic: if true, the largest logit is chosen and nothing sampled.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.ReinMax(rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((100, 3))).sum()
        Array(100., dtype=float32)

    Source: arXiv:2304.08612
    """

    def __init__(
        self,
        temperature: Any = 1.0,
        *,
        axis: int = -1,
        deterministic: bool | None = False,
        rng_collection: str = "sample",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        """Makes the layer; it has no parameters.

        Args:
            temperature: as for `reinmax`.
            axis: the axis of the classes.
            deterministic: if true, nothing is sampled; `model.eval()` sets it.
            rng_collection: the stream of `rngs` that the keys of samples come from.
            rngs: random numbers for the samples.

        Raises:
            ValueError: the temperature is not positive and finite.
        """
        super().__init__(temperature, axis, deterministic, rng_collection, rngs)

    def _choose(self, logits: jax.Array, key: jax.Array | None, temperature: Any) -> jax.Array:
        return reinmax(logits, key, temperature, axis=self.axis)
