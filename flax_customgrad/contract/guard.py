"""What is checked of a user's operation where it is called, beside its cotangents.

Each is something that JAX or NNX lets pass without a word, or reports where nobody looks for it: a
closure over what is differentiated, a fwd that is not the function, a Variable that is
differentiated and that the backward leaves out. The operations of this library do without: their
tests compare them with autodiff.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.contract import closures, compat, cotangents, traced_function
from flax_customgrad.contract.arguments import PackedTree, Static
from flax_customgrad.contract.traced_function import TracedFunction, Updates

Function = Callable[..., Any]


class Guard:
    """The checks of one operation.

    Args:
        name: the operation, for messages.
        primal: takes the structure of a call and its arrays; returns the output and what was
            written.
    """

    def __init__(self, name: str, primal: Callable[..., tuple[Any, Updates]]):
        self._name = name
        self._primal = primal
        self._traced: dict[Any, TracedFunction] = {}
        self._derivative: Any = None

    def enter(self, function: Function, call: Static, arrays: Sequence[Any]) -> None:
        """Checks a call, before JAX sees it.

        Args:
            function: the function of the operation.
            call: the structure of the call.
            arrays: its arrays.

        Raises:
            TypeError: the function closes over what is differentiated.
        """
        self._derivative = compat.innermost_derivative()
        self._check_closure("function", function, call, call.value.unpack, arrays)

    def check_fwd(self, fwd: Function, call: Static, arrays: Sequence[Any]) -> None:
        """Checks a fwd, where it will run.

        Args:
            fwd: the forward rule.
            call: the structure of the call.
            arrays: its arrays.

        Raises:
            TypeError: it closes over what is differentiated.
        """
        self._check_closure("fwd", fwd, call, call.value.unpack, arrays)

    def check_bwd(
        self, bwd: Function, call: Static, residuals: PackedTree, arrays: Sequence[Any], out: Any
    ) -> None:
        """Checks a bwd, before JAX forgets where it was called.

        Args:
            bwd: the backward rule.
            call: the structure of the call.
            residuals: the structure of the residuals.
            arrays: their arrays.
            out: the output of the operation.

        Raises:
            TypeError: it closes over what is differentiated.
        """
        g = jax.tree.map(_cotangent_like, out)
        self._check_closure("bwd", bwd, call, lambda kept: (residuals.unpack(kept), g), arrays)

    def check_residuals(self, residuals: PackedTree) -> None:
        """Checks the residuals, where bwd is about to run.

        Args:
            residuals: their structure.

        Raises:
            TypeError: a static value among them holds an array of the forward.
        """
        static = residuals.static_leaves
        closures.check_residuals(self._name, static, compat.is_of_finished_trace)

    def _check_closure(
        self,
        role: str,
        function: Function,
        call: Static,
        args: Callable[[Sequence[Any]], tuple[Any, ...]],
        arrays: Sequence[Any],
    ) -> None:
        def is_lost(array: Any) -> bool:
            return compat.is_of_derivative(array, self._derivative) or (
                compat.is_of_finished_trace(array)
            )

        def run(*arrays: Any) -> Any:
            return function(*args(arrays))

        static = call.value.static_leaves
        closures.check(self._name, role, function, is_lost, run, arrays, static)

    def compare_fwd(
        self, call: Static, arrays: Sequence[Any], out: Any, written: Updates
    ) -> frozenset[int]:
        """Compares a fwd with the function, which is traced once for each structure of a call.

        Args:
            call: the structure of the call.
            arrays: its arrays.
            out: the output that fwd returned.
            written: what it wrote.

        Returns:
            The positions of the arrays on which the output depends; none where JAX cannot trace
            the function on its own, as with a `jax.Ref` among the arrays.

        Raises:
            TypeError: fwd returns or writes something else.
        """
        avals = list(map(jax.typeof, arrays))
        if any(map(compat.is_reference, avals)):
            return frozenset()
        key = (call, tuple((aval.shape, aval.dtype) for aval in avals))
        if key not in self._traced:
            primal = functools.partial(self._primal, call)
            try:
                self._traced[key] = traced_function.trace(primal, arrays)
            except Exception as error:
                if compat.is_concrete_value_error(error):
                    return frozenset()  # it branches in Python on a value, which is known here
                raise
        self._traced[key].check_fwd(self._name, out, written)
        return self._traced[key].needed

    def check_left_out(
        self, left_out: Mapping[int, str], needed: frozenset[int], differentiated: Sequence[bool]
    ) -> None:
        """Refuses zero as the gradient of a Variable that a backward did not mention.

        A backward names the Params of a Module; statistics and counters it may leave out.

        Args:
            left_out: by position, what to say of an array that was left out.
            needed: positions of the arrays on which the output depends.
            differentiated: whether each array is differentiated.

        Raises:
            CotangentError: one that was left out is differentiated, and the output depends on it.
        """
        for i, message in left_out.items():
            if i in needed and differentiated[i]:
                raise cotangents.CotangentError(message)


def _cotangent_like(array: Any) -> Any:
    """An array as its own cotangent; of what has no gradient, float0."""
    is_inexact = jnp.issubdtype(jnp.result_type(array), jnp.inexact)
    return array if is_inexact else np.zeros(jnp.shape(array), jax.dtypes.float0)
