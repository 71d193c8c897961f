"""Stop gradient: the identity, whose backward stops the cotangent in places or at some steps.

    forward   y  = x
    backward  dx = where(stopped, 0, g)
    kept      stopped

What is stopped is 0 whatever `g` is, infinite and NaN included. `stopped` may be traced, so that
one compiled step serves before, in and after a window of steps; where it is known in Python it
costs nothing, and what leads to `x` is not differentiated at all.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.gradients.shaping.shaping_arguments import check_broadcasts, map_arrays
from flax_customgrad.numerics.argument_checks import is_integer
from flax_customgrad.numerics.dtypes import as_array


class Residuals(NamedTuple):
    """What the backward of `stop_cotangent` keeps."""

    stopped: jax.Array


@custom_vjp(surrogate=True)
def stop_cotangent(x: jax.Array, stopped: jax.Array) -> jax.Array:
    """Returns `x`.

    Args:
        x: array of any shape, float or complex.
        stopped: bool array that broadcasts to `x`, True where the backward stops the cotangent.
    """
    return x


def _fwd(x: jax.Array, stopped: jax.Array) -> tuple[jax.Array, Residuals]:
    return stop_cotangent(x, stopped), Residuals(stopped)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    stopped = res.stopped
    chex.assert_type(stopped, bool)
    chex.assert_is_broadcastable(stopped.shape, g.shape)
    dx = jnp.where(stopped, jnp.zeros_like(g), g)
    chex.assert_equal_shape([dx, g])
    return dx, None


stop_cotangent.defvjp(_fwd, _bwd)


def stop_gradient(x: Any, where: Any = True) -> Any:
    """The identity, with a gradient that is 0 in places.

    Args:
        x: array of any shape, or a tree of arrays. Integers have no gradient and pass as they are.
        where: True where the gradient is stopped: a boolean, or an array of them that broadcasts
            to x.

    Returns:
        x.

    Raises:
        TypeError: `where` is not boolean.
        ValueError: `where` does not broadcast to x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([1.0, 2.0, 3.0])
        >>> jax.grad(lambda x: jnp.sum(fcg.stop_gradient(x, where=x > 2) ** 2))(x)
        Array([2., 4., 0.], dtype=float32)
    """
    if isinstance(where, bool | np.bool_):
        return map_arrays(lambda x: lax.stop_gradient(x) if where else x, x)
    where = as_array(where)
    if not isinstance(where, jax.Array) or where.dtype != bool:
        came = where.dtype if isinstance(where, jax.Array) else repr(where)
        raise TypeError(f"stop_gradient: where is {came}; write a boolean or an array of them")

    def shape(x: jax.Array) -> jax.Array:
        check_broadcasts("stop_gradient: where", where, x)
        return stop_cotangent(x, where) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return map_arrays(shape, x)


class StopGradient(nnx.Module):
    """The identity, with a gradient that is stopped at some steps.

    It is stopped at the steps start, start + every, start + 2 every, ... before stop:

    - `StopGradient(stop=1000)` warms up: what lies before it learns from step 1000 on;
    - `StopGradient(start=1000)` freezes what lies before it from step 1000 on;
    - `StopGradient(every=20)` in a scan truncates backpropagation through time.

    Attributes:
        start: the first step at which the gradient is stopped.
        stop: the step from which on it passes, or None for never.
        every: the distance from each step at which it is stopped to the next.

    Raises:
        TypeError: one of them is no int.
        ValueError: `stop` is not after `start`, or `every` is below 1.

    Example:
        Of a sum over ten steps in windows of four, the last state sees the last two, steps 8 and 9.

        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> window = fcg.StopGradient(every=4)
        >>> def last_state(x):
        ...     def body(carry, inputs):
        ...         step, x = inputs
        ...         return window(carry, step) + x, None
        ...     return jax.lax.scan(body, jnp.zeros(()), (jnp.arange(10), x))[0]
        >>> jax.grad(last_state)(jnp.ones(10))
        Array([0., 0., 0., 0., 0., 0., 0., 0., 1., 1.], dtype=float32)
    """

    def __init__(self, start: int = 0, stop: int | None = None, every: int = 1):
        for name, value in {"start": start, "stop": stop, "every": every}.items():
            unset = name == "stop" and value is None
            if not (unset or is_integer(value)):
                raise TypeError(f"StopGradient: {name}={value!r} must be an int")
        if stop is not None and stop <= start:
            raise ValueError(
                f"StopGradient: stop={stop} must be after start={start}, the first step at which "
                "the gradient is stopped"
            )
        if every < 1:
            raise ValueError(f"StopGradient: every={every} must be at least 1")
        self.start, self.every = int(start), int(every)
        self.stop = None if stop is None else int(stop)

    def stops_at(self, step: Any) -> Any:
        """Whether the gradient is stopped at a step.

        Args:
            step: an int, or integers of any shape.

        Returns:
            A boolean, or an array of them.

        Raises:
            TypeError: a step that is no integer.
        """
        step = as_array(step)
        if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise TypeError(f"StopGradient: step={step!r} must be an int or an array of integers")
        if isinstance(step, jax.Array):
            # A narrow or unsigned step does not hold every start and stop.
            step = step.astype(jnp.result_type(step, jnp.int32))
        stops = (step >= self.start) & ((step - self.start) % self.every == 0)
        return stops if self.stop is None else stops & (step < self.stop)

    def __call__(self, x: Any, step: Any) -> Any:
        """Applies the layer.

        Args:
            x: array of any shape, or a tree of arrays.
            step: an int; or integers that broadcast to x, which may be traced.

        Returns:
            x.

        Raises:
            TypeError: the step is no integer.
            ValueError: the steps do not broadcast to x.
        """
        return stop_gradient(x, self.stops_at(step))
