"""A Variable that a backward leaves out of its cotangent.

A backward names the Params of a Module; other Variables (statistics, counters) it may leave out,
and their gradient is zero. Where one of them is differentiated and the output depends on it, zero
would be wrong without a word. Whether an array is differentiated shows in one place alone: JAX
goes on with the cotangent of what is, and drops that of what is not. So what may be left out passes
through an identity on its way into the operation, and the backward of that identity raises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax_customgrad.contract import compat
from flax_customgrad.contract.arguments import Static
from flax_customgrad.contract.binding import bind
from flax_customgrad.contract.cotangents import CotangentError


class LeftOut:
    """What the backward of one operation has left out, for each structure of a call."""

    def __init__(self) -> None:
        self._messages: dict[Static, Mapping[int, str]] = {}

    def watch(self, call: Static, arrays: Sequence[Any], positions: Sequence[int]) -> list[Any]:
        """Lets arrays pass, and raises where one is differentiated and was left out.

        Args:
            call: the structure of the call.
            arrays: all that the operation is given.
            positions: those of the arrays that may be left out.
        """
        passed = list(arrays)
        for i in positions:
            if compat.is_traced(arrays[i]):  # one that is not traced is not differentiated
                passed[i] = _identity(Static((self, call, i)), arrays[i])
        return passed

    def note(self, call: Static, messages: Mapping[int, str]) -> None:
        """Notes what a backward has left out, before JAX goes on with its cotangents.

        Args:
            call: the structure of the call.
            messages: by position, what to say where that array is differentiated.
        """
        self._messages[call] = messages

    def check(self, call: Static, position: int) -> None:
        """Raises, where an array was left out.

        Args:
            call: the structure of the call.
            position: that of the array, which is differentiated.

        Raises:
            CotangentError: it was left out.
        """
        message = self._messages.get(call, {}).get(position)
        if message is not None:
            raise CotangentError(message)


def _primal(watched: Static, array: Any) -> Any:
    return array


def _fwd(watched: Static, array: Any) -> tuple[Any, Static]:
    return array, watched


def _bwd(watched: Static, g: Any) -> tuple[None, Any]:
    left_out, call, position = watched.value
    left_out.check(call, position)
    return None, g


_identity = bind(_primal, _fwd, _bwd)
