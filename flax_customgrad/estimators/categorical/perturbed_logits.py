"""Perturbed logits: the checks of logits and temperature, and the noise that makes a sample.

The largest of logits plus standard Gumbel noise is a sample from their softmax, and the k largest
are k samples without replacement (arXiv:1611.01144, arXiv:1903.06059). The noise is drawn in
float32 whatever the dtype of the logits: bfloat16 noise takes few values, of which one is infinite.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.promotion import promoting
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_positive, is_integer
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, in_dtype, is_python_number
from flax_customgrad.numerics.sharding import explicit_sharding


def gumbel_noise(key: jax.Array | None, logits: jax.Array) -> jax.Array | None:
    """Standard Gumbel noise.

    Args:
        key: a key of `jax.random`, or None.
        logits: the array to which it is added, of any shape.

    Returns:
        Array of the shape of the logits, float32; None without a key.
    """
    if key is None:
        return None
    sharding = explicit_sharding(jax.typeof(logits))
    return jax.random.gumbel(key, logits.shape, jnp.float32, out_sharding=sharding)


def perturb(logits: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Logits with noise added, in float32 or wider.

    Args:
        logits: array of any shape, float.
        noise: an array of the shape of logits, or None for no noise.

    Returns:
        Array of that shape, float32 or wider.
    """
    z = logits.astype(accumulator(logits))
    return z if noise is None else z + noise.astype(z.dtype)


@promoting
def check_logits_and_temperature(
    name: str, logits: Any, temperature: Any, axis: int, k: int = 1
) -> tuple[jax.Array, Any]:
    """Checks the logits and the temperature of an estimator; values only where they are not traced.

    Args:
        name: the estimator, for messages.
        logits: array of any shape, float.
        temperature: a number, or an array that broadcasts to the logits and has size 1 along the
            axis.
        axis: the axis of the classes.
        k: how many classes a row chooses.

    Returns:
        The logits as an array, and the temperature as a number or a floating array.

    Raises:
        TypeError: the logits are not floating.
        ValueError: there is no such axis; there are fewer than k classes, or fewer than k whose
            logits are not -inf; a logit is NaN or infinity; the temperature is not positive and
            finite, or has another shape.
    """
    logits = jnp.asarray(as_array(logits))
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name}: logits are {logits.dtype}; expected a floating dtype")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"{name}: axis={axis} is not an axis of logits of shape {logits.shape}")
    classes = logits.shape[axis]
    if not is_integer(k) or not 1 <= k <= classes:
        raise ValueError(
            f"{name}: k={k!r} of the {classes} classes on axis {axis} of logits of shape "
            f"{logits.shape}; expected 1 <= k <= {classes}"
        )
    if not is_traced(logits) and bool(_has_faulty_row(logits, axis, k)):
        raise ValueError(
            f"{name}: a row of the logits holds NaN or infinity, or fewer than {k} numbers; "
            "-inf masks a class, and as many as are chosen must remain"
        )
    return logits, _check_temperature(name, temperature, logits.shape, axis)


def _check_temperature(name: str, temperature: Any, shape: tuple[int, ...], axis: int) -> Any:
    if is_python_number(temperature):
        return check_positive(name, "temperature", temperature)
    temperature = check_positive(name, "temperature", jnp.asarray(as_array(temperature)))
    rows = tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
    if not broadcasts(temperature.shape, rows):
        raise ValueError(
            f"{name}: temperature has shape {temperature.shape}; expected a number, or an array "
            f"that broadcasts to {rows}, one number for each row"
        )
    return in_dtype(temperature, jnp.promote_types(temperature.dtype, jnp.float16))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _has_faulty_row(logits: jax.Array, axis: int, k: int) -> jax.Array:
    too_few = jnp.sum(logits > -jnp.inf, axis) < k
    return jnp.any(too_few) | ~jnp.all(logits < jnp.inf)
