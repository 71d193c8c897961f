"""`Entry`: what the catalogue records of one layer, and the makers of its examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

Example = Callable[[Any], tuple[Any, ...]]
"""Makes the arguments of `check_vjp` from a class or function: (layer, *inputs), or
(function, layer, *inputs), or (function, *inputs)."""


class Curve(NamedTuple):
    """A function of one number; the documentation draws it and its gradient.

    Attributes:
        function: takes and returns arrays of one shape, element by element.
        low: the left end of its graph.
        high: the right end.
    """

    function: Callable[[jax.Array], jax.Array]
    low: float = -2.0
    high: float = 2.0


@dataclass(frozen=True)
class Entry:
    """One layer of the library: a Module, or a function such as an activation.

    Attributes:
        name: its public name, `flax_customgrad.<name>`.
        family: the folder that holds it.
        module: the class, or the function.
        reference: the class or function of flax.nnx (or jax.nn) that it stands in for; None where
            there is none.
        gradient: "exact" where the backward is the derivative of the forward, "surrogate" where
            it is meant to differ.
        keeps: what the backward keeps.
        gain: what the hand-written backward is for, in a few words.
        source: its paper or issue; empty where the mathematics is elementary.
        formula: of a surrogate, what its backward is meant to return, stated independently of how
            it is computed: a function of what an example is called with and of the output's
            cotangent, `formula(*args, g, **keywords)`, one cotangent per argument. The arguments
            of a Module's example start with the Module.
        curves: graphs of the function and its gradient by name, where one number says it all.
        examples: makers of small examples by name, for `check_vjp`. They take the class or
            function to use, `module` or `reference`; inputs have a leading axis of 8, one per
            device of a mesh.
        workloads: makers of examples of a realistic size by name, for benchmarks.
        operations: the operations of `custom_vjp` that the tests run through this layer, each with
            the name of the example that goes through every check: one that has whatever the
            operation can get wrong.
    """

    name: str
    family: str
    module: Callable[..., Any]
    reference: Callable[..., Any] | None
    gradient: Literal["exact", "surrogate"]
    keeps: str
    gain: str
    source: str = ""
    formula: Callable[..., tuple[Any, ...]] | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    examples: Mapping[str, Example] = field(default_factory=dict)
    workloads: Mapping[str, Example] = field(default_factory=dict)
    operations: Mapping[Any, str] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether it is a function of arrays, and not a Module."""
        return not (isinstance(self.module, type) and issubclass(self.module, nnx.Module))

    @property
    def stands_for(self) -> str:
        """The full name of what it replaces, such as `nnx.Linear`; empty where there is nothing."""
        if self.reference is None:
            return ""
        return f"{'nnx' if hasattr(nnx, self.name) else 'jax.nn'}.{self.name}"

    @property
    def is_drop_in(self) -> bool:
        """Whether it replaces a layer or function of flax.nnx; `convert` swaps Modules."""
        return self.reference is not None
