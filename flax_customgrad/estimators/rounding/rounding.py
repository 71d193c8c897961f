"""Rounding and clipping with a gradient: the straight-through estimator, arXiv:1308.3432.

    round_ste         the nearest integer, halves to the even one     dx = g
    floor_ste         the largest integer up to x                     dx = g
    ceil_ste          the smallest integer from x                     dx = g
    trunc_ste         the integer part, towards zero                  dx = g
    stochastic_round  floor(x), or with probability x - floor(x)      dx = g
                      the integer above it, arXiv:1502.02551
    clip_ste          min(max(x, low), high)                          dx = g, or, masked,
                                                                      g where low <= x <= high
    kept              nothing; clip_ste, masked, a mask

The derivative of a step is 0 wherever it has one. Straight-through, the error of rounding is taken
as a constant: y = x + e, and so dy = dx.

`jnp.clip` has derivative 1/2 at a bound, so that `jnp.clip(round_ste(x), low, high)` halves the
gradient of every value that is rounded onto a bound; a masked `clip_ste` has 1 there.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_customgrad.estimators.rounding.step import Step, keep_none, straight_through
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.packing import masked

_ROUND = Step("round_ste", jnp.round, straight_through, keep_none)
_FLOOR = Step("floor_ste", jnp.floor, straight_through, keep_none)
_CEIL = Step("ceil_ste", jnp.ceil, straight_through, keep_none)
_TRUNC = Step("trunc_ste", jnp.trunc, straight_through, keep_none)


def round_ste(x: ArrayLike) -> jax.Array:
    """Rounds to the nearest integer, halves to the even one; the gradient passes unchanged.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([0.5, 1.5, -1.2])
        >>> fcg.round_ste(x)
        Array([ 0.,  2., -1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.round_ste(3 * x).sum())(x)
        Array([3., 3., 3.], dtype=float32)
    """
    return _ROUND(x)


def floor_ste(x: ArrayLike) -> jax.Array:
    """Rounds down; the gradient passes unchanged.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> fcg.floor_ste(1.7), jax.grad(fcg.floor_ste)(1.7)
        (Array(1., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    return _FLOOR(x)


def ceil_ste(x: ArrayLike) -> jax.Array:
    """Rounds up; the gradient passes unchanged.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> fcg.ceil_ste(1.2), jax.grad(fcg.ceil_ste)(1.2)
        (Array(2., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    return _CEIL(x)


def trunc_ste(x: ArrayLike) -> jax.Array:
    """Rounds towards zero; the gradient passes unchanged.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> fcg.trunc_ste(-1.7), jax.grad(fcg.trunc_ste)(-1.7)
        (Array(-1., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    return _TRUNC(x)


# stochastic_round, whose noise is uniform in [0, 1).


def round_with_noise(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds up where the noise is below the fraction of x, else down."""
    # Not floor(x + noise): for large x that sum is rounded, and ends above too often.
    below = jnp.floor(x)
    return below + (noise < x - below)


_STOCHASTIC = Step("stochastic_round", round_with_noise, straight_through, keep_none)


def stochastic_round(x: ArrayLike, key: jax.Array) -> jax.Array:
    """Rounds up with probability x - floor(x), else down, so that the mean is x.

    The gradient passes unchanged.

    Args:
        x: array of any shape; an integer stays as it is.
        key: a key of `jax.random`.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.stochastic_round)(0.5, jax.random.key(0))
        Array(1., dtype=float32, weak_type=True)

    Source: arXiv:1502.02551
    """
    x = jnp.asarray(x)
    noise = jax.random.uniform(key, x.shape, accumulator(x))
    return _STOCHASTIC(x, noise)


class StochasticRound(nnx.Module):
    """`stochastic_round` as a layer that draws its own noise.

    Args:
        rng_collection: the stream of `rngs` to draw from.
        rngs: the streams.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.StochasticRound(rngs=nnx.Rngs(0))
        >>> layer(jnp.full(10000, 0.3)).mean().round(1)
        Array(0.3, dtype=float32)
    """

    def __init__(self, *, rng_collection: str = "noise", rngs: nnx.Rngs):
        self.rngs = rngs[rng_collection].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rounds an array.

        Args:
            x: array of any shape.

        Returns:
            Array like x.
        """
        return stochastic_round(x, self.rngs())


# clip_ste


def _clip(x: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    return jnp.minimum(jnp.maximum(x, low), high)


def _keep_within_bounds(x: jax.Array, low: ArrayLike, high: ArrayLike) -> tuple[jax.Array]:
    return ((x >= low) & (x <= high),)


_CLIP = {
    "pass_through": Step("clip_ste", _clip, straight_through, keep_none),
    "masked": Step("clip_ste", _clip, masked, _keep_within_bounds),
}


def clip_ste(
    x: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    gradient: Literal["pass_through", "masked"] = "pass_through",
) -> jax.Array:
    """Clips, with a gradient that passes everywhere, or where x lies within the bounds.

    Args:
        x: array of any shape.
        low: the lower bound; a number or an array that broadcasts to x. It has no gradient.
        high: the upper bound, likewise.
        gradient: "pass_through": the gradient passes unchanged, also beyond the bounds, so that it
            can lead x back. "masked": it passes where low <= x <= high, bounds included.

    Returns:
        Array like x.

    Raises:
        ValueError: `gradient` is neither "pass_through" nor "masked", or low is above high.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> def quantize(x):
        ...     return fcg.clip_ste(fcg.round_ste(x), -1, 1, gradient="masked")
        >>> jax.vmap(jax.grad(quantize))(jnp.array([0.8, 1.2, 1.8]))
        Array([1., 1., 0.], dtype=float32)
    """
    check_word("clip_ste", "gradient", gradient, _CLIP)
    if _are_numbers(low, high) and low > high:  # type: ignore[operator]
        raise ValueError(f"clip_ste: low={low} is above high={high}")
    return _CLIP[gradient](x, low, high)


def _are_numbers(*bounds: Any) -> bool:
    return all(isinstance(bound, int | float) for bound in bounds)
