"""top_k_st: the k largest, with the gradient of a softmax.

    forward   z = logits + noise       standard Gumbel noise where there is a key, else none
              y = 1 for the k largest of z along an axis, 0 elsewhere
              p = softmax(z / temperature)
    backward  dlogits      = J(p) g / temperature,  J(p) g = p (g - sum p g)
              dtemperature = -sum dlogits log(p)
    kept      p, from which `temperature_softmax` computes both
    at a tie  the lower index comes first: there are exactly k ones

With noise that is a sample of k classes without replacement, and with k = 1 the straight-through
Gumbel-softmax. Half precision is computed in float32. A traced row that has no k largest, because
it holds NaN or infinity or too few classes that are not masked, is NaN.

Source: arXiv:1903.06059
"""

import operator
from typing import Any, NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.categorical.k_hot import k_hot
from flax_customgrad.estimators.categorical.perturbed_logits import (
    check_logits_and_temperature,
    gumbel_noise,
    perturb,
)
from flax_customgrad.estimators.categorical.sampler import KeySource, Sampler
from flax_customgrad.estimators.categorical.temperature_softmax import (
    softmax_at_temperature,
    softmax_gradients,
)
from flax_customgrad.numerics.argument_checks import check_size


class Residuals(NamedTuple):
    """What the backward of `top_k` keeps: `p`, in the dtype of the logits."""

    p: jax.Array
    temperature: Any
    axis: int


@custom_vjp(surrogate=True)
def top_k(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, k: int, axis: int
) -> jax.Array:
    """Marks the k largest of each row.

    Args:
        logits: array of any shape, float.
        temperature: temperature of the backward; a number, or a floating array that broadcasts
            against a row.
        noise: array like logits, which is added to them first; None for none. It has no gradient.
        k: how many are marked.
        axis: the axis of the classes.

    Returns:
        Array like logits, of zeros and ones.
    """
    return k_hot(perturb(logits, noise), k, axis).astype(logits.dtype)


def _fwd(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, k: int, axis: int
) -> tuple[jax.Array, Residuals]:
    y = top_k(logits, temperature, noise, k, axis)
    p = softmax_at_temperature(perturb(logits, noise), temperature, axis)
    return y, Residuals(p.astype(logits.dtype), temperature, axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    chex.assert_equal_shape([res.p, g])
    dlogits, dtemperature = softmax_gradients(res.p, g, res.temperature, res.axis)
    chex.assert_equal_shape([dlogits, g])
    if dtemperature is not None:
        chex.assert_equal_shape([dtemperature, res.temperature])
    return dlogits, dtemperature, None, None, None


top_k.defvjp(_fwd, _bwd)


def top_k_st(
    logits: jax.Array,
    k: int,
    temperature: Any = 1.0,
    *,
    key: jax.Array | None = None,
    axis: int = -1,
) -> jax.Array:
    """Marks the k largest of each row, with the gradient of a softmax: a k-hot mask that trains.

    Args:
        logits: array of any shape, float; -inf masks a class, which gets no gradient.
        k: how many are marked, from 1 to the number of classes.
        temperature: temperature of the softmax whose gradient is used; a number, or an array (which
            may be traced and gets a gradient) that broadcasts against the logits and has size 1
            along the axis. A traced one is not checked.
        key: a key to sample k classes without replacement; None for the k largest.
        axis: the axis of the classes.

    Returns:
        Array like logits with exactly k ones in each row, and zeros; NaN in a traced row of which
        no k classes can be chosen.

    Raises:
        TypeError: the logits are not floating.
        ValueError: k is not from 1 to the number of classes; a row holds NaN or infinity, or fewer
            than k classes that are not masked; the temperature is not positive and finite, or has a
            wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> logits = jnp.array([0.0, 2.0, 1.0])
        >>> fcg.top_k_st(logits, 2)
        Array([0., 1., 1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.top_k_st(x, 2)[0])(logits).round(3)
        Array([ 0.082, -0.06 , -0.022], dtype=float32)

    Source: arXiv:1903.06059
    """
    logits, temperature = check_logits_and_temperature("top_k_st", logits, temperature, axis, k)
    return top_k(logits, temperature, gumbel_noise(key, logits), operator.index(k), axis)


class TopKST(Sampler):
    """`top_k_st` as a layer: the k largest of each row, or k samples without replacement.

    Attributes:
        k: how many classes are marked.
        sample: whether they are sampled.
        temperature: of the backward; a number, an array or a Variable.
        axis: the axis of the classes.
        deterministic: if true, nothing is sampled: the k largest are marked.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.TopKST(2)(jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
        Array([[0., 1., 1.],
               [1., 1., 0.]], dtype=float32)

    Source: arXiv:1903.06059
    """

    def __init__(
        self,
        k: int,
        temperature: Any = 1.0,
        *,
        sample: bool = False,
        axis: int = -1,
        deterministic: bool | None = False,
        rng_collection: str = "sample",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        """Makes the layer; it has no parameters of its own.

        Args:
            k: how many are marked, at least 1.
            temperature: as for `top_k_st`; an `nnx.Param` is learned.
            sample: whether k classes are sampled; if not, the k largest are marked.
            axis: the axis of the classes.
            deterministic: if true, nothing is sampled; `model.eval()` sets it.
            rng_collection: the stream of `rngs` that the keys of samples come from.
            rngs: random numbers for the samples.

        Raises:
            ValueError: k is less than 1, or the temperature is not positive and finite.
        """
        super().__init__(temperature, axis, deterministic, rng_collection, rngs)
        self.k = check_size("TopKST", "k", k)
        self.sample = sample

    def key(self, deterministic: bool | None, rngs: KeySource) -> jax.Array | None:
        """The key of the next sample; None if the k largest are marked.

        Args:
            deterministic: used instead of the layer's.
            rngs: used instead of the layer's.

        Raises:
            ValueError: the layer samples, and neither layer nor call gives `deterministic`, or
                neither gives `rngs`.
        """
        return super().key(deterministic, rngs) if self.sample else None

    def _choose(self, logits: jax.Array, key: jax.Array | None, temperature: Any) -> jax.Array:
        return top_k_st(logits, self.k, temperature, key=key, axis=self.axis)
