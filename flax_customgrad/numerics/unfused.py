"""`unfused`: a part of a program that XLA on a CPU computes on its own, and once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def unfused(static_argnums: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of arrays a call that XLA on a CPU neither takes apart nor fuses.

    XLA fuses an elementwise computation into each of the operations that use its result, however
    long it is: a LayerNorm has six sums and passes over its input, forward and backward, and each
    would compute the 49 products of a 7 x 7 window anew. A call is computed once and its result is
    stored. It is traced once for all calls with arguments of the same types.

    Args:
        static_argnums: which argument is static: hashable, and no array.

    Returns:
        A decorator.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(jax.jit, static_argnums=static_argnums)
        @functools.wraps(function)
        def jitted(*args: Any) -> Any:
            # The mark is that of the call, and not of each operation in it.
            with set_xla_metadata(inlineable=None):
                return function(*args)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            # JAX sets the mesh in a backward, to that which there is: without it a trace of the
            # forward would be another one.
            mesh = jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())
            with mesh, set_xla_metadata(inlineable="false"):
                return jitted(*args)

        return call

    return decorator
