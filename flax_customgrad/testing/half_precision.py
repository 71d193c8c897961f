"""The check of a narrower dtype: the gradient against that in float64 of the same rounded inputs.

A backward that computes in float32 and rounds once is off by half a unit in the last place. One
that rounds before it sums, or carries a sum in half precision, is off by more the longer the sum
is: so the inputs are repeated to thousands of rows, over which the gradient of a parameter is
summed. Each repetition adds the same, so the sum grows until what is added to it is lost.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.testing.compare import Comparison, Fn
from flax_customgrad.testing.difference import relative_error
from flax_customgrad.testing.problem import Gradient, Problem, floating

_ROWS = 2048
# In units in the last place of the largest expected value. A function that rounds its result alone
# is off by half a unit, and its gradient by little more. One that is made of several rounds between
# them, and what that costs is no mistake.
_UNITS = 2.0
_LIMIT = 8.0


def in_dtype(
    low: Problem, *, high: Problem, dtype: Any, allowed: float | None
) -> Iterator[Comparison]:
    """The comparisons in a dtype: as the arguments are, and of two bytes with repeated inputs.

    Args:
        low: the problem in the dtype.
        high: the same problem in float64, with the same rounded arguments.
        dtype: the dtype.
        allowed: the error allowed, relative to the largest expected value; None for a few units
            in the last place.
    """
    wide = high.at([jnp.asarray(a, h.dtype) for a, h in zip(low.arrays, high.arrays, strict=True)])

    def tolerance(units: float) -> Callable[[np.ndarray], float]:
        if allowed is not None:
            return lambda expected, allowed=allowed: allowed
        return lambda expected: units * _unit_in_last_place(expected, dtype)

    def adds_up() -> bool:
        """Whether more is rounded than the value: the value is off by more than one rounding."""
        values = jax.jit(low.apply(low.fn))(*low.arrays), jax.jit(wide.apply(wide.fn))(*wide.arrays)
        pairs = zip(*map(floating, values), strict=True)
        arrays = [[np.asarray(a, np.float64) for a in pair] for pair in pairs]
        return any(relative_error(a, b) > 0.51 * _unit_in_last_place(b, dtype) for a, b in arrays)

    yield Comparison(
        dtype.name,
        lambda fn: low.linear_gradient(fn)(*low.arrays),
        lambda: wide.linear_gradient(wide.reference)(*wide.arrays),
        tolerance=tolerance(_UNITS),
        limit=tolerance(_LIMIT),
        adds_up=adds_up,
    )
    rows, times = _rows_to_repeat(wide) if dtype.itemsize == 2 else ((), 1)
    summed = [k for k, i in enumerate(low.differentiable) if i not in rows]
    if not rows or not summed:
        return

    def gradient(p: Problem, fn: Fn) -> Gradient:
        whole = p.linear_gradient(fn)(*_repeated(p.arrays, rows, times))
        return tuple(whole[k] for k in summed)

    yield Comparison(
        f"{dtype.name}, {times * len(low.arrays[rows[0]])} rows",
        lambda fn: gradient(low, fn),
        lambda: gradient(wide, wide.reference),
        of=[low.names[low.differentiable[k]] for k in summed],
        tolerance=tolerance(_UNITS),
        limit=tolerance(_LIMIT),
        adds_up=adds_up,
    )


def _rows_to_repeat(p: Problem) -> tuple[tuple[int, ...], int]:
    """The inputs that have rows, and how many times to repeat them.

    These are the inputs whose first axis has the same size, the largest for which the reference
    takes them repeated.
    """
    sizes = {len(p.arrays[i]) for i in p.inputs if p.arrays[i].ndim}
    for size in sorted(sizes, reverse=True):
        rows = tuple(i for i in p.inputs if p.arrays[i].ndim and len(p.arrays[i]) == size)
        times = math.ceil(_ROWS / size) if size else 1
        try:
            jax.eval_shape(
                lambda *arrays, rows=rows, times=times: p.apply(p.reference)(
                    *_repeated(arrays, rows, times)
                ),
                *p.arrays,
            )
        except Exception:
            continue
        return rows, times
    return (), 1


def _repeated(arrays: Sequence[jax.Array], rows: Sequence[int], times: int) -> list[jax.Array]:
    return [jnp.concatenate([a] * times) if i in rows else a for i, a in enumerate(arrays)]


def _unit_in_last_place(expected: np.ndarray, dtype: Any) -> float:
    """One unit in the last place of the largest expected value, relative to that value."""
    finite = np.abs(expected[np.isfinite(expected)])
    largest = finite.max(initial=0.0)
    if not largest:
        return float(jnp.finfo(dtype).eps)
    return 2.0 ** (math.floor(math.log2(largest)) - jnp.finfo(dtype).nmant) / largest
