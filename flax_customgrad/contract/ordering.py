"""When XLA computes what a backward computes anew."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import jax
from jax import lax

from flax_customgrad.contract.compat import is_traced

Arrays = TypeVar("Arrays")

# A context that JAX knows of, because it decides what a trace holds: see `autodiff`.
_transposing = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def transposing() -> Iterator[None]:
    """Inside, a backward is traced for `jax.linear_transpose`, to which it must be linear in g."""
    with _transposing(True):
        yield


def is_transposing() -> bool:
    """Whether a backward is traced for `jax.linear_transpose`, which cannot take all operations."""
    return _transposing.value


def wait_for(g: jax.Array, arrays: Arrays) -> tuple[jax.Array, Arrays]:
    """A cotangent, and arrays that XLA does not read before the cotangent is there.

    A backward that decodes codes, or rounds a kernel again, needs nothing of the cotangent for it.
    XLA on a CPU would do it as early as it can, for all layers of a model at once, or share the
    floats with the forward, and hold them until then: eight layers W8A8 took 26 MB where they take
    7 now, and 17 in float32. Before JAX 0.12 XLA takes barriers out too early, and does so still.

    Args:
        g: the cotangent, float.
        arrays: a tree of arrays, each of which the backward reads: XLA holds what it is given here.
    """
    # What waits for g would be linear in it, too.
    if not is_traced(g) or is_transposing():
        return g, arrays
    return lax.optimization_barrier((g, arrays))
