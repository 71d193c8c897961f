"""Weights to train on, behind codes: the same quantizer makes the same codes and scales of them.

The values that codes stand for will not do. A scale that is measured, a mean or a percentile, is
another one of values than of the weights before: of a ternary kernel a is mean |W|, and the mean of
|a|, |a|, 0 is less than a. So the elements that the scale hangs on are moved, away from zero or
towards it, until what is measured of them is the scale, to the bit:

    w        what `Scheme.latent` gives for the codes
    moved    of the elements that share a scale those of the largest magnitude; or the largest of
             the other sign, or those that are zero
    by       steps from one number of the dtype to the next, which meet every maximum; or steps of
             the last bit of their sum, which then is exact in any order and meets every mean

What is measured grows with the number of steps, if at all, so the number is found by doubling and
halving. In half precision there may be none: a scale is then a little off, and the codes are right.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MOST_STEPS = 1 << 31
"""More than there are from zero to the largest number of float32."""


class Measured(NamedTuple):
    """What a quantizer makes of weights: their codes, and the scales that decode them."""

    codes: Any
    scales: Sequence[Any]


def latent_weights(
    w: jax.Array,
    wanted: Measured,
    measure: Callable[[jax.Array], Measured],
    spread: Callable[[jax.Array], jax.Array] = lambda a: a,
) -> jax.Array:
    """Moves weights until a quantizer measures what it has measured of the weights before.

    Args:
        w: array of any shape, float, not traced: weights that may have the right codes.
        wanted: what the quantizer made of the weights before.
        measure: what it makes of others.
        spread: repeats what is like a scale along the blocks of weights that share it.

    Returns:
        Array like w.
    """
    found = np.array(w)
    codes, scales = np.asarray(wanted.codes), [np.asarray(scale) for scale in wanted.scales]

    def results(w: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        made = measure(jnp.asarray(w))
        return np.asarray(made.codes) == codes, [np.asarray(scale) for scale in made.scales]

    for j, scale in enumerate(scales):
        if not (scale.size and found.size):
            continue
        numbers = spread(jnp.arange(scale.size).reshape(scale.shape))
        of, start = np.broadcast_to(np.asarray(numbers), found.shape).ravel(), found
        for first, choose, by in _WAYS:
            if np.array_equal(results(found)[1][j], scale, equal_nan=True):
                break
            value = lambda w, j=j: results(w)[1][j].ravel()  # noqa: E731
            moved = _moved(
                start, choose(start.ravel(), of, scale.size), of, scale.ravel(), value, by
            )
            same_codes, got = results(moved)
            # Earlier scales stay; the first way may come close, the others have to meet this one.
            good = np.ones(scale.size, bool)
            np.logical_and.at(good, of, same_codes.ravel())
            for a, b in zip(got[: j if first else j + 1], scales, strict=False):
                good &= (a == b).ravel() if a.size == scale.size else bool((a == b).all())
            found = np.where(good[of].reshape(found.shape), moved, found)
    return jnp.asarray(found)


def _largest(w: np.ndarray, of: np.ndarray, n: int) -> np.ndarray:
    """Which elements have the largest magnitude of those that share a scale."""
    most = np.zeros(n, w.dtype)
    np.maximum.at(most, of, np.abs(w))
    return (np.abs(w) == most[of]) & (w != 0)


def _opposite(w: np.ndarray, of: np.ndarray, n: int) -> np.ndarray:
    """Which have the largest magnitude of those with the other sign: the other end of a range."""
    positive = np.zeros(n, bool)
    positive[of[_largest(w, of, n) & (w > 0)]] = True
    return _largest(np.where((w > 0) != positive[of], w, 0), of, n)


def _zero(w: np.ndarray, of: np.ndarray, n: int) -> np.ndarray:
    return w == 0


def _by_numbers(w: np.ndarray, of: np.ndarray, total: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Magnitudes so many numbers of their dtype further."""
    integer = np.dtype(f"i{w.dtype.itemsize}")
    last = np.array(jnp.finfo(w.dtype).max, w.dtype).view(integer).astype(np.int64)
    return np.clip(w.view(integer).astype(np.int64) + steps, 0, last).astype(integer).view(w.dtype)


def _by_last_bits(
    w: np.ndarray, of: np.ndarray, total: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Magnitudes that are multiples of the last bit of the sum, so many of them more."""
    unit = np.spacing(total.astype(np.result_type(np.float32, w.dtype)))[of].astype(np.float64)
    return np.maximum((np.round(w / unit) + steps) * unit, 0).astype(w.dtype)


_WAYS = (
    (True, _largest, _by_numbers),
    (False, _largest, _by_last_bits),
    (False, _opposite, _by_numbers),
    (False, _zero, _by_numbers),
    (False, _zero, _by_last_bits),
)


def _moved(
    w: np.ndarray,
    movable: np.ndarray,
    of: np.ndarray,
    target: np.ndarray,
    measure: Callable[[np.ndarray], np.ndarray],
    by: Callable[..., np.ndarray],
) -> np.ndarray:
    """Weights moved by the fewest steps that reach the target, for all scales at once."""
    n, flat, which = target.size, w.ravel(), np.flatnonzero(movable)
    count = np.bincount(of[which], minlength=n)
    # Elements that share a scale take steps in turn.
    order = which[np.argsort(of[which], kind="stable")]
    group = of[order]
    turn = np.arange(order.size) - (np.cumsum(count) - count)[group]
    sign = np.where(np.signbit(flat[order]), -1, 1).astype(w.dtype)
    total = np.bincount(of, np.abs(flat).astype(np.float64), n)
    further = partial(by, np.abs(flat[order]), group, total)

    def at(t: np.ndarray) -> np.ndarray:
        result = flat.copy()
        steps = (t[group] + count[group] - 1 - turn) // count[group]
        result[order] = sign * further(steps)
        return result.reshape(w.shape)

    def reached(t: np.ndarray) -> np.ndarray:
        return measure(at(t)) >= target

    searched, started = count > 0, reached(np.zeros(n, np.int64))
    # The target is reached above, and not below, once the two of them enclose it.
    below, above = np.where(started, -1, 0), np.where(started, 0, 1)
    outside = searched.copy()
    while outside.any():
        end = np.where(started, below, above)
        outside &= (reached(end) == started) & (np.abs(end) < _MOST_STEPS * np.maximum(count, 1))
        down, up = outside & started, outside & ~started
        below, above = (
            np.where(down, 2 * below, np.where(up, above, below)),
            np.where(down, below, np.where(up, 2 * above, above)),
        )
    while (searched & (above - below > 1)).any():
        middle = (below + above) // 2
        is_reached = reached(middle)
        below, above = np.where(is_reached, below, middle), np.where(is_reached, middle, above)
    return at(np.where(searched, above, 0))
