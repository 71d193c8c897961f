"""The binding: how a primal, a forward and a backward become something that JAX differentiates.

This is the one file that talks to JAX's machinery of differentiation. It binds to `jax.custom_vjp`,
over a flat list of arrays. `nnx.custom_vjp` offers no more than that once a Module is split, costs
up to 1.7 times the eager forward of a layer, traces slower than plain nnx on current flax, and
fails with `jax_custom_vjp3` (in every mode on jax 0.10, in the default mode on 0.12).
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax

Rule = Callable[..., Any]


def bind(primal: Rule, forward: Rule, backward: Rule) -> Rule:
    """Makes a function of arrays that JAX differentiates by two rules.

    Args:
        primal: called as `primal(static, *arrays)`; returns a tree of arrays.
        forward: called like `primal`; returns what it returns, and residuals, a tree of arrays.
        backward: called with the residuals and the cotangent of what `primal` returns; returns one
            cotangent for `static`, None, and one for each array.

    Returns:
        A function called like `primal`.
    """
    bound = jax.custom_vjp(_with_known_signature(primal))
    bound.defvjp(_with_known_signature(forward), _with_known_signature(backward))
    return bound


def _with_known_signature(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function whose signature JAX need not work out anew at each call."""

    def function(*args: Any) -> Any:
        return method(*args)

    function.__name__ = method.__name__
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return function
