"""top_k_st: the k largest, with the gradient of a softmax.

    forward   y = 1 for the k largest of z = logits + G along an axis, 0 elsewhere
              G standard Gumbel noise where there is a key, 0 where there is none
    backward  dlogits = J(p) g / tau,  p = softmax(z / tau),  J(p) g = p (g - sum p g)
              dtau    = -sum (J(p) g) z / tau^2
    kept      p, from which `relaxation` gets both
    at a tie  the lower index is taken first: there are exactly k ones

With noise that is a sample of k classes without replacement (arXiv:1903.06059), and with k = 1 the
straight-through Gumbel-softmax. Half precision is computed in float32. A traced row that has no k
largest, because it holds NaN or infinity or too few classes that are not masked, is NaN.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.categorical.k_hot import k_hot
from flax_customgrad.estimators.categorical.logits import checked, gumbel, perturbed
from flax_customgrad.estimators.categorical.relaxation import Residuals, relaxed, relaxed_gradient
from flax_customgrad.estimators.categorical.sampler import Rngs, Sampler


@custom_vjp(surrogate=True)
def top_k(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, k: int, axis: int
) -> jax.Array:
    """Marks the k largest of each row.

    Args:
        logits: array of any shape, float.
        temperature: of the backward; a number, or a floating array that broadcasts against a row.
        noise: array like logits, which is added to them first; None for none. It has no gradient.
        k: how many are marked.
        axis: the axis of the classes.

    Returns:
        Array like logits, of zeros and ones.
    """
    return k_hot(perturbed(logits, noise), k, axis).astype(logits.dtype)


def _fwd(
    logits: jax.Array, temperature: Any, noise: jax.Array | None, k: int, axis: int
) -> tuple[jax.Array, Residuals]:
    p = relaxed(perturbed(logits, noise), temperature, axis).astype(logits.dtype)
    return top_k(logits, temperature, noise, k, axis), Residuals(p, temperature, axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    dlogits, dtemperature = relaxed_gradient(res, g)
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
        temperature: of the softmax whose gradient is taken; a number, or an array (which may be
            traced and gets a gradient) that broadcasts against the logits and has size 1 along
            the axis. A traced one is not checked.
        key: a key to sample k classes without replacement; None takes the k largest.
        axis: the axis of the classes.

    Returns:
        Array like logits with exactly k ones in each row, and zeros; NaN in a traced row of which
        no k classes can be chosen.

    Raises:
        TypeError: the logits are not floating.
        ValueError: k is no number of classes; a row holds NaN or infinity, or fewer than k classes
            that are not masked; the temperature is not positive and finite, or has a wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> logits = jnp.array([0.0, 2.0, 1.0])
        >>> fcg.top_k_st(logits, 2)
        Array([0., 1., 1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.top_k_st(x, 2)[0])(logits).round(3)
        Array([ 0.082, -0.06 , -0.022], dtype=float32)
    """
    logits, temperature = checked("top_k_st", logits, temperature, axis, k)
    return top_k(logits, temperature, gumbel(key, logits), k, axis)


class TopKST(Sampler):
    """`top_k_st` as a layer: the k largest of each row, or k samples without replacement.

    Attributes:
        k: how many classes are marked.
        sample: whether they are sampled.
        temperature: of the backward; a number, an array or a Variable.
        axis: the axis of the classes.
        deterministic: if true, nothing is sampled: the k largest are taken.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.TopKST(2)(jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
        Array([[0., 1., 1.],
               [1., 1., 0.]], dtype=float32)
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
            sample: whether k classes are sampled; if not, the k largest are taken.
            axis: the axis of the classes.
            deterministic: if true, nothing is sampled; `model.eval()` sets it.
            rng_collection: the stream of `rngs` that the samples take their keys from.
            rngs: random numbers for the samples.

        Raises:
            ValueError: k is less than 1, or the temperature is not positive and finite.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"TopKST: k={k!r} must be a whole number of at least 1")
        super().__init__(temperature, axis, deterministic, rng_collection, rngs)
        self.k = k
        self.sample = sample

    def __call__(
        self,
        logits: jax.Array,
        *,
        temperature: Any = None,
        deterministic: bool | None = None,
        rngs: Rngs = None,
    ) -> jax.Array:
        """Marks k classes of each row.

        Args:
            logits: array of any shape, float.
            temperature: takes the place of the layer's; it may be traced.
            deterministic: takes the place of the layer's.
            rngs: takes the place of the layer's; a key will do.

        Returns:
            Array like logits, of zeros and ones.

        Raises:
            ValueError: as `top_k_st`, or there is nothing to draw a key from.
        """
        key = self.key(deterministic, rngs) if self.sample else None
        temperature = self.temperature if temperature is None else temperature
        return top_k_st(logits, self.k, temperature, key=key, axis=self.axis)
