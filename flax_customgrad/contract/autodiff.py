"""The switch between the hand-written backwards and JAX's own differentiation.

Inside `use_autodiff` every exact layer computes as flax.nnx does and JAX differentiates that, so
that a comparison is one line away. It is forward mode too where the binding has none.
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
        >>> ours = nnx.grad(lambda layer: layer(jnp.ones((4, 3))).sum())(layer)
        >>> with fcg.use_autodiff():
        ...     theirs = nnx.grad(lambda layer: layer(jnp.ones((4, 3))).sum())(layer)
        >>> bool((ours.kernel[...] == theirs.kernel[...]).all())
        True
    """
    with _context(True):
        yield


def in_use() -> bool:
    """Whether the caller stands inside `use_autodiff`."""
    return _context.value
