"""The switch between the hand-written backwards and JAX's own differentiation.

`jax.custom_vjp`, on which the contract stands, has no forward mode: `jax.jvp`, `jax.jacfwd` and
`jax.linearize` refuse it. Inside `use_autodiff` every exact layer computes as flax.nnx does and
JAX differentiates that, so that forward mode, and a comparison, are one line away.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

# A context that JAX itself knows of: it is part of the key under which jit, scan and remat keep
# what they traced, so a function traced outside the context is traced anew inside it.
_context = jax.make_user_context(default_value=False)


@contextmanager
def use_autodiff() -> Iterator[None]:
    """Lets JAX differentiate every exact layer and operation, instead of its written backward.

    Straight-through and surrogate gradients are left as they are: autodiff has no answer for them.

    Returns:
        A context manager, or a decorator of a function. It acts on the thread that enters it, and
        on what is traced in it.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> with fcg.use_autodiff():
        ...     jacobian = jax.jacfwd(layer)(jnp.ones(3))
        >>> jacobian.shape
        (2, 3)
    """
    with _context(True):
        yield


def in_use() -> bool:
    """Whether the caller stands inside `use_autodiff`."""
    return _context.value
