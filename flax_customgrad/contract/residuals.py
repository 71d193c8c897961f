"""What a backward keeps: the arrays that JAX holds between the forward and the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from flax_customgrad.contract.residual_storage import inspecting_residuals


@dataclass(frozen=True)
class Residual:
    """One array kept for the backward.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        nbytes: its size in bytes.
        is_argument: it is one of the function's own arguments, which the caller holds anyway.
    """

    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    is_argument: bool


def residuals(fn: Callable[..., Any], *args: Any) -> list[Residual]:
    """Traces a function and its backward, and lists what is kept in between.

    This is what JAX keeps before XLA optimizes; under scan and across a jit boundary it is what
    stays in memory. Nothing is computed.

    Args:
        fn: a function of trees of floating arrays.
        *args: the trees, or their shapes and dtypes.

    Returns:
        One entry per array. An array kept twice counts once.
    """
    kept: list[Residual] = []

    def trace(*args: Any) -> None:
        _, pull = jax.vjp(fn, *args)
        kept.extend(residual for _, residual in kept_arrays(pull, args))

    with inspecting_residuals():
        jax.eval_shape(trace, *args)
    return kept


def kept_arrays(pull: Any, args: Any) -> list[tuple[jax.Array, Residual]]:
    """The arrays that a backward holds, each once, and what `residuals` lists of them.

    Args:
        pull: the backward that `jax.vjp` returned.
        args: the trees that it was called with.
    """
    own = {id(leaf) for leaf in jax.tree.leaves(args)}
    held = {id(leaf): leaf for leaf in jax.tree.leaves(pull) if not _is_state(leaf)}
    return [
        (leaf, Residual(leaf.shape, leaf.dtype, leaf.size * leaf.dtype.itemsize, key in own))
        for key, leaf in held.items()
    ]


def _is_state(leaf: Any) -> bool:
    """Whether a leaf is the Ref of a `BackwardState`, which its layer holds anyway."""
    return isinstance(leaf, jax.Ref)


def residual_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The bytes kept for the backward of a function beyond its own arguments.

    Args:
        fn: a function of trees of floating arrays.
        *args: the trees, or their shapes and dtypes.
    """
    return sum(r.nbytes for r in residuals(fn, *args) if not r.is_argument)
