"""`scan`: `lax.scan` for a forward whose residuals may have no cotangent.

In a gradient of a tangent nothing flows back into what a forward keeps. Before 0.12 JAX fails
there: where the stacked outputs of a scan have no cotangent, it takes the type of the stack for
that of one step. A barrier behind each output has a cotangent of zeros.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

_NEEDS_COTANGENTS = jax.__version_info__ < (0, 12)


def scan(f: Callable[..., Any], init: Any, xs: Any, **kwargs: Any) -> tuple[Any, Any]:
    """`lax.scan`, which may be transposed where its outputs have no cotangent.

    Args:
        f: takes a carry and a slice of `xs`, returns a carry and an output.
        init: the first carry.
        xs: arrays whose first axis is scanned over.
        **kwargs: those of `lax.scan`.

    Returns:
        The last carry, and the outputs, stacked.
    """
    results = lax.scan(f, init, xs, **kwargs)
    # One for each, so that what is not used is not computed.
    return jax.tree.map(lax.optimization_barrier, results) if _NEEDS_COTANGENTS else results
