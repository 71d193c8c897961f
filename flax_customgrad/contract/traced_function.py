"""What a function returns, writes and depends on, from one trace of it.

Where it is differentiated its fwd takes its place, so fwd has to return and to write the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from flax_customgrad.contract import writes
from flax_customgrad.contract.cotangents import describe

Updates = list[tuple[Any, list[Any]]]
"""What was written to each Module and Variable: its paths, and the new values."""


@dataclass(frozen=True)
class TracedFunction:
    """A function as JAX traced it.

    Attributes:
        out: its output, in shapes and dtypes.
        written: the paths that it wrote in each Module and Variable.
        needed: positions of the floating arrays from which floating values flow to the output.
    """

    out: Any
    written: list[Any]
    needed: frozenset[int]

    def check_fwd(self, name: str, out: Any, updates: Updates) -> None:
        """Refuses a fwd that returns or writes something else.

        Args:
            name: the operation, for the message.
            out: the output that fwd returned.
            updates: what it wrote.

        Raises:
            TypeError: the output differs in structure, shape or dtype, or the Variables differ.
        """
        came = [paths.value for paths, _ in updates]
        if came != self.written:
            pairs = zip(came, self.written, strict=True)
            differ = sorted({path for a, b in pairs for path in {*a} ^ {*b}}, key=str)
            raise TypeError(
                f"`{name}` and its fwd write different Variables ({writes.dotted(differ)}): fwd "
                "takes the place of the function where it is differentiated, so it has to write "
                "what the function writes"
            )
        if _types(out) != _types(self.out):
            raise TypeError(
                f"the fwd of `{name}` returned the output {describe(out)}, and the function "
                f"returns {describe(self.out)}; fwd returns (output, residuals)"
            )


def trace(function: Callable[..., tuple[Any, Updates]], arrays: Sequence[Any]) -> TracedFunction:
    """Traces a function.

    Args:
        function: takes the arrays; returns its output and what it wrote.
        arrays: of any shapes and dtypes.
    """
    jaxpr, (out, updates) = jax.make_jaxpr(function, return_shape=True)(*arrays)
    size = len(jax.tree.leaves(out))
    return TracedFunction(out, [p.value for p, _ in updates], _needed(jaxpr.jaxpr, size))


def _needed(jaxpr: Any, size: int) -> frozenset[int]:
    """The inputs of a program from which floating values flow to the first of its outputs."""
    live = {id(var) for var in jaxpr.outvars[:size] if _is_floating(var)}
    for eqn in reversed(jaxpr.eqns):
        flows = eqn.primitive.name != "stop_gradient"
        if flows and any(id(var) in live for var in eqn.outvars):
            live.update(id(var) for var in eqn.invars if _is_floating(var))
    return frozenset(i for i, var in enumerate(jaxpr.invars) if id(var) in live)


def _is_floating(var: Any) -> bool:
    return hasattr(var.aval, "dtype") and jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _types(tree: Any) -> tuple[Any, list[Any]]:
    """The structure of a tree, and shape and dtype of each of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
