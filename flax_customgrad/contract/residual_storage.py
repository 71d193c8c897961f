"""`store` and `restore`: an array between the passes, in as few bytes as it has.

XLA on a CPU widens the half-precision arrays that a `lax.scan` stacks up for its backward to
float32, twice their size, with jax before 0.12. It leaves integers alone: eight bfloat16 silu over
8 MB keep 201 MB as they are and 84 MB as their bits. The contract does this for every residual.

Bits have no derivative, so the array stays beside them for second derivatives to run through. The
backward reads the bits alone, and XLA drops what nobody reads.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.compat import is_traced

_WIDENED = jax.__version_info__ < (0, 12)
# A context that JAX knows of, because it decides what a trace holds: see `autodiff`.
_inspecting = jax.make_user_context(default_value=False)


class Stored(NamedTuple):
    """An array that is kept, and where it pays its bits: uint16 of the same shape."""

    array: jax.Array
    bits: jax.Array | None


def store(array: jax.Array) -> Stored:
    """Marks an array as kept for the backward.

    Args:
        array: of any shape and dtype.
    """
    pays = (
        _WIDENED
        and array.dtype in (jnp.bfloat16, jnp.float16)
        # Outside of a trace there is no XLA to drop the second copy.
        and is_traced(array)
        and jax.default_backend() == "cpu"
        and not is_inspecting_residuals()
    )
    return Stored(array, lax.bitcast_convert_type(array, jnp.uint16) if pays else None)


def restore(kept: Stored) -> jax.Array:
    """The array again.

    Args:
        kept: what `store` returned.
    """
    if kept.bits is None:
        return kept.array
    return with_derivative_of(lax.bitcast_convert_type(kept.bits, kept.array.dtype), kept.array)


def keep_for_second_order(array: jax.Array) -> jax.Array | None:
    """An array as it is kept beside its codes, for second derivatives, which alone read it.

    Args:
        array: of any shape, float.

    Returns:
        The array; None outside of a trace, where nothing is dropped and there are no second
        derivatives to come, and while residuals are looked at.
    """
    return array if is_traced(array) and not is_inspecting_residuals() else None


@jax.custom_jvp
def with_derivative_of(decoded: jax.Array, array: jax.Array) -> jax.Array:
    """What was decoded from integers, with the derivative of the array that they stand for.

    Args:
        decoded: float array.
        array: array of the same values, which only a derivative of the result reads.
    """
    return decoded


@with_derivative_of.defjvp
def _with_derivative_of_jvp(primals, tangents):
    return with_derivative_of(*primals), tangents[1]


def is_inspecting_residuals() -> bool:
    """Whether residuals are being listed: then nothing is kept that XLA would drop."""
    return _inspecting.value


@contextlib.contextmanager
def inspecting_residuals() -> Iterator[None]:
    """Inside, no bits are kept: for looking at residuals before XLA drops any."""
    with _inspecting(True):
        yield
