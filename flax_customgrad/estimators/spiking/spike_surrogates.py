"""Surrogate gradients of a spike, in place of the derivative of a step, which is 0.

u is the membrane potential minus the threshold, k the slope, and v = k |u|.

    forward   s  = 1 where u > 0, else 0; NaN where u is NaN
    backward  du = g peak p(v)
    kept      u, the slope and the peak; boxcar a mask, one byte an element, and the peak

                         p(v)                    peak   normalized  k by default  source
    fast_sigmoid         1 / (1 + v)^2           1      k / 2       25            arXiv:1705.11146
    atan                 1 / (1 + (pi v / 2)^2)  k / 2  k / 2       2             arXiv:2007.05785
    sigmoid              4 s(v) (1 - s(v))       k / 4  k / 4       4             arXiv:1706.02609
    triangular           max(1 - v, 0)           1      k           1             arXiv:1603.08270
    boxcar               1 where v <= 1          1      k / 2       1             arXiv:1706.02609
    piecewise_exponential  exp(-v)               1      k / 2       1             arXiv:1810.08646

At its default slope each peak is 1. With `normalize=True` the gradient integrates to 1 over u: a
density, whose scale does not depend on which surrogate was chosen; atan and sigmoid always are.
Libraries differ by such factors: atan is that of the paper and of snntorch, spyx has
1/pi / (1 + (pi v)^2).

Every p falls to 0, also where v overflows to infinity: the exponentials are of -v, where those of
snntorch 1.0.0 make its sigmoid NaN. The triangle is positive on both sides of the threshold, where
snntorch's is a constant that changes its sign.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.estimators.rounding.heaviside import heaviside
from flax_customgrad.estimators.rounding.step import Step
from flax_customgrad.numerics.argument_checks import check_positive
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.hyperbolic import sech_squared
from flax_customgrad.numerics.packing import masked


def _spike_step(name: str, p: Callable[[jax.Array], jax.Array]) -> Step:
    """A step of (u, slope, peak), with the surrogate gradient p."""

    def backward(g: jax.Array, u: jax.Array, slope: jax.Array, peak: jax.Array) -> jax.Array:
        v = slope * jnp.abs(u)
        return g * peak * p(v)

    return Step(name, heaviside, backward)


_FAST_SIGMOID = _spike_step("fast_sigmoid", lambda v: jnp.square(1 / (1 + v)))
_ATAN = _spike_step("atan", lambda v: 1 / (1 + jnp.square(jnp.pi / 2 * v)))
_SIGMOID = _spike_step("sigmoid", lambda v: sech_squared(v / 2))  # 4 s(v) (1 - s(v))
_TRIANGULAR = _spike_step("triangular", lambda v: jnp.maximum(1 - v, 0))
_EXPONENTIAL = _spike_step("piecewise_exponential", lambda v: jnp.exp(-v))


def fast_sigmoid(u: ArrayLike, slope: ArrayLike = 25.0, *, normalize: bool = False) -> jax.Array:
    """A spike with the derivative of u / (1 + k abs(u)): SuperSpike.

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, how fast the gradient falls off beside the threshold: a positive number or array
            that broadcasts to u, such as one for each neuron. It may be traced, and has no
            gradient.
        normalize: whether the gradient integrates to 1: its peak is then k / 2 instead of 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> u = jnp.array([-0.04, 0.0, 0.12])
        >>> fcg.surrogate.fast_sigmoid(u)
        Array([0., 0., 1.], dtype=float32)
        >>> jax.grad(lambda u: fcg.surrogate.fast_sigmoid(u).sum())(u)
        Array([0.25  , 1.    , 0.0625], dtype=float32)

    Source: arXiv:1705.11146
    """
    slope = check_positive("fast_sigmoid", "slope", slope)
    return _FAST_SIGMOID(u, slope, slope / 2 if normalize else 1)


def atan(u: ArrayLike, slope: ArrayLike = 2.0, *, normalize: bool = False) -> jax.Array:
    """A spike with the derivative of arctan(pi k u / 2) / pi.

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, twice the peak of the gradient; as in `fast_sigmoid`.
        normalize: changes nothing: this gradient integrates to 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.surrogate.atan)(0.0)
        Array(1., dtype=float32, weak_type=True)

    Source: arXiv:2007.05785
    """
    slope = check_positive("atan", "slope", slope)
    return _ATAN(u, slope, slope / 2)


def sigmoid(u: ArrayLike, slope: ArrayLike = 4.0, *, normalize: bool = False) -> jax.Array:
    """A spike with the derivative of the sigmoid of k u.

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, four times the peak of the gradient; as in `fast_sigmoid`.
        normalize: changes nothing: this gradient integrates to 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.vmap(jax.grad(fcg.surrogate.sigmoid))(jnp.array([0.0, 1000.0]))
        Array([1., 0.], dtype=float32)

    Source: arXiv:1706.02609
    """
    slope = check_positive("sigmoid", "slope", slope)
    return _SIGMOID(u, slope, slope / 4)


def triangular(u: ArrayLike, slope: ArrayLike = 1.0, *, normalize: bool = False) -> jax.Array:
    """A spike whose gradient is a triangle of width 2 / k.

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, of both sides of the triangle; as in `fast_sigmoid`.
        normalize: whether the gradient integrates to 1: its peak is then k instead of 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.vmap(jax.grad(fcg.surrogate.triangular))(jnp.array([-0.25, 0.25, 1.5]))
        Array([0.75, 0.75, 0.  ], dtype=float32)

    Source: arXiv:1603.08270
    """
    slope = check_positive("triangular", "slope", slope)
    return _TRIANGULAR(u, slope, slope if normalize else 1)


def piecewise_exponential(
    u: ArrayLike, slope: ArrayLike = 1.0, *, normalize: bool = False
) -> jax.Array:
    """A spike whose gradient falls off exponentially: exp(-k abs(u)).

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, how fast it falls off; as in `fast_sigmoid`.
        normalize: whether the gradient integrates to 1: its peak is then k / 2 instead of 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.vmap(jax.grad(fcg.surrogate.piecewise_exponential))(jnp.array([-1.0, 0.0]))
        Array([0.3678..., 1.        ], dtype=float32)

    Source: arXiv:1810.08646
    """
    slope = check_positive("piecewise_exponential", "slope", slope)
    return _EXPONENTIAL(u, slope, slope / 2 if normalize else 1)


# boxcar, which keeps a mask.


def _boxcar_backward(g: jax.Array, inside: jax.Array, peak: jax.Array) -> jax.Array:
    return masked(g * peak, inside)


def _keep_inside(u: jax.Array, slope: Any, peak: Any) -> tuple[jax.Array, Any]:
    u, slope = widened(u.dtype, u, jnp.asarray(slope))
    return slope * jnp.abs(u) <= 1, peak


_BOXCAR = Step("boxcar", heaviside, _boxcar_backward, _keep_inside)


def boxcar(u: ArrayLike, slope: ArrayLike = 1.0, *, normalize: bool = False) -> jax.Array:
    """A spike whose gradient is a box: 1 where k abs(u) <= 1, bounds included, else 0.

    Normalized, it is the rectangle of arXiv:1706.02609; otherwise it is the straight-through
    estimator of arXiv:1602.02830 for a unit step.

    Args:
        u: membrane potential minus threshold; array of any shape.
        slope: k, for a box of width 2 / k; as in `fast_sigmoid`.
        normalize: whether the gradient integrates to 1: its height is then k / 2 instead of 1.

    Returns:
        Array like u, 1 where u > 0 and 0 elsewhere.

    Raises:
        ValueError: the slope is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.vmap(jax.grad(fcg.surrogate.boxcar))(jnp.array([-1.0, 0.5, 1.5]))
        Array([1., 1., 0.], dtype=float32)

    Source: arXiv:1706.02609, arXiv:1602.02830
    """
    slope = check_positive("boxcar", "slope", slope)
    return _BOXCAR(u, slope, slope / 2 if normalize else 1)
