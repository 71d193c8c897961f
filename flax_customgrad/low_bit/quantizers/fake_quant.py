"""FakeQuant: rounding to integers of few bits, in a range that is measured.

    symmetric   y = s clip(round(x / s), -n, n),                     n = 2^(bits-1) - 1
    affine      y = s (clip(round(x / s) + z, 0, n) - z),            n = 2^bits - 1
    stochastic  x + (u - 1/2) s in place of x,                       u uniform in [0, 1)
    backward    dx = g where the range holds x, else 0
    kept        nothing where the range is that of x itself; else a bit an element

Straight-through, the slope of round is taken as 1. Within the range that of y is then s / s = 1,
beyond it y is a constant.

Scale s and zero point z come from the range (`calibration`), a constant to the gradient: a gradient
of the scale is what `LSQ` is for. Halves are rounded to the even integer, and the ends of
the range are inside of it. With 8 bits the largest magnitude is 127 steps; qwix and AQT make it
127.5, which clips half a step of it.

Rounded to the nearest after a noise of half a step, a value keeps its mean, arXiv:1502.02551. The
gradient does not depend on the noise, only on whether the range holds x. Under
`jax.vmap` examples have the same noise.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.residual_storage import with_derivative_of
from flax_customgrad.low_bit.quantizers.calibration import (
    Axis,
    Granularity,
    Range,
    granularity_of,
    measured_range,
    scale_of,
)
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.packing import masked, pack_mask
from flax_customgrad.numerics.scaling import quotient
from flax_customgrad.numerics.sharding import AxisName, varying_like

Calibration = Literal["absmax", "percentile", "moving_average"]
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class FakeQuantScheme(Scheme):
    """Integers in a range; the parameters are its scale and, for an affine one, its zero point.

    Attributes:
        granularity: which elements share a range.
        clips: whether an element may lie outside of it. Then the range's ends come after the
            parameters, which `keep` needs and a code does not.
    """

    granularity: Granularity
    clips: bool

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`round(x / s) + z`, clipped."""
        scale, zero = self._broadcast(x, parameters)
        return jnp.clip(jnp.round(quotient(x, scale)) + zero, self.low, self.high)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`s (q - z)`."""
        scale, zero = self._broadcast(q, parameters)
        return (q - zero) * scale

    def step(self, *parameters: jax.Array) -> jax.Array | None:
        """`s`; of blocks there is none for a sum."""
        return parameters[0] if self.granularity.block is None else None

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """`z`, or 0."""
        return parameters[1] if self.low == 0 else 0

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """Which elements the range holds."""
        if not self.clips:
            return ()
        scale, zero = self._broadcast(x, parameters)
        least, largest = (self.granularity.spread(p, x.shape) for p in parameters[-2:])
        # Rounding the zero point moves the values half a step at most, and the scale of an empty
        # range is 1: the range holds what it was measured of, and what is not clipped.
        least = jnp.minimum(least, (self.low - zero) * scale)
        largest = jnp.maximum(largest, (self.high - zero) * scale)
        return (pack_mask((x >= least) & (x <= largest)),)

    def cotangents(self, g: jax.Array, *inside: jax.Array) -> tuple[Any, ...]:
        """`g` where the range holds x, and 0 elsewhere."""
        return (masked(g, *inside) if inside else g,)

    def _broadcast(self, x: jax.Array, parameters: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        is_affine = self.low == 0
        scale, *zero = (self.granularity.spread(p, x.shape) for p in parameters[: 1 + is_affine])
        return scale, zero[0] if zero else 0


class QuantStat(nnx.Variable):
    """An end of the range that a quantizer has recorded; infinite, or empty, before it has."""


class FakeQuant(Quantizer):
    """Rounds to integers of few bits, and passes the gradient where its range holds x.

    Args:
        bits: from 2 to 16.
        symmetric: whether the range lies around 0, where 0 is exact and there is no zero point.
        axis: the axes along which each index has a range of its own, such as -1 for the output
            channels of a kernel; "token" for each vector along the last axis; None for one range.
        block: how many neighbours along the one `axis` share a range; None for no blocks.
        calibration: the source of the range: "absmax", the largest magnitude; "percentile", a
            percentile of the values; "moving_average", an average of the largest magnitudes of
            training calls.
        percentile: which percentile, from 50 to 100.
        momentum: momentum of the moving average, from 0 to below 1.
        dynamic: True for the range of each array itself, False for the one that `observe` has
            recorded. None, the default, is for the range of each array until there is a recorded
            one, which `calibrate` records or a checkpoint brings; the gradient passes everywhere
            until `calibrate` turns it into False. For weights, and where examples, tokens or blocks
            have ranges of their own, None means True.
        rounding: "nearest"; or "stochastic", at random to one of the two neighbours, such that the
            mean is exact, and to the nearest in eval mode (see `nnx.Module.eval`).
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` whose devices or examples hold parts
            of one array, with one range for all parts; None where each array is whole.
        rng_collection: the stream of `rngs` to draw from.
        rngs: the streams; needed for stochastic rounding.

    Raises:
        ValueError: an argument is out of the range stated above, `dynamic` is True for a moving
            average, or stochastic rounding has no `rngs`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.FakeQuant(bits=2)(jnp.array([-1.0, 0.2, 0.6]))
        Array([-1.,  0.,  1.], dtype=float32)
        >>> static = fcg.FakeQuant(bits=4, dynamic=False)
        >>> static.observe(jnp.array([0.7, -0.1]))
        >>> static(jnp.array([0.52, 2.0]))
        Array([0.5, 0.7], dtype=float32)
        >>> jax.grad(lambda x: static(x).sum())(jnp.array([0.52, 2.0]))
        Array([1., 0.], dtype=float32)

    Source: arXiv:1712.05877
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        symmetric: bool = True,
        axis: Axis = None,
        block: int | None = None,
        calibration: Calibration = "absmax",
        percentile: float = 99.9,
        momentum: float = 0.99,
        dynamic: bool | None = None,
        rounding: Rounding = "nearest",
        axis_name: AxisName = None,
        rng_collection: str = "noise",
        rngs: nnx.Rngs | None = None,
    ):
        if calibration not in ("absmax", "percentile", "moving_average"):
            raise ValueError(
                f'FakeQuant: calibration={calibration!r} must be "absmax", "percentile" or '
                '"moving_average"'
            )
        if not 50 <= percentile <= 100:
            raise ValueError(f"FakeQuant: percentile={percentile!r} must be from 50 to 100")
        if not 0 <= momentum < 1:
            raise ValueError(f"FakeQuant: momentum={momentum!r} must be in [0, 1)")
        averaged = calibration == "moving_average"
        if averaged and dynamic:
            raise ValueError(
                "FakeQuant: a moving average is of several arrays: leave dynamic out, or write "
                'calibration="absmax" for the range of each array'
            )
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f'FakeQuant: rounding={rounding!r} must be "nearest" or "stochastic"')
        self.bits = check_bits("FakeQuant", bits, most=16)
        self.symmetric = symmetric
        self.granularity = granularity_of("FakeQuant", axis, block, axis_name)
        self.calibration = calibration
        self.percentile = percentile
        self.momentum = momentum
        if dynamic is None and not averaged and self.granularity.is_per_example:
            dynamic = True
        self.dynamic = False if averaged else None if dynamic is None else bool(dynamic)
        self.use_running_average = False
        self.deterministic = False
        self.rngs = nnx.data(None)
        if rounding == "stochastic":
            self.rngs = fork_stream('FakeQuant: rounding="stochastic"', rng_collection, rngs)
        self.low: QuantStat | None = nnx.data(None)
        self.high: QuantStat | None = nnx.data(None)
        if not self.dynamic:
            # The empty range, whose ends any number moves; of channels the number is not known.
            shape = () if self.granularity.axis is None else (0,)
            self.low = QuantStat(jnp.full(shape, jnp.inf, jnp.float32))
            self.high = QuantStat(jnp.full(shape, -jnp.inf, jnp.float32))

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        largest = 2 ** (self.bits - 1) - 1
        return -largest, largest

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return () if self.low is None else self.granularity.stack_axes(self.low.shape)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        In training (see `nnx.Module.train`) a moving average first includes the range of x.

        Args:
            x: array of any shape, float.

        Raises:
            ValueError: `dynamic` is False, and nothing has been observed; or a range that was
                recorded does not fit the shape of x.
        """
        x = jnp.asarray(x)
        low, high = self.integers
        found = self._used_range(lax.stop_gradient(x))
        clips = self.dynamic is False or self._is_percentile
        scheme = FakeQuantScheme(low, high, self.granularity, clips)
        parameters = scale_of(found, low, high, self.symmetric)
        ends = found if clips else ()
        nearest = to_codes(x, (*parameters, *ends), scheme)._replace(parameters=parameters)
        if self.rngs is None or self.deterministic:
            return nearest
        values, codes = scheme(self._dithered(x, parameters[0]), *parameters, *ends)
        values = with_derivative_of(in_dtype(values, x.dtype), nearest.values)
        return nearest._replace(values=values, codes=codes)

    def _dithered(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """`x` plus noise of half a step, in float32 or wider; without a derivative."""
        assert self.rngs is not None
        x, step = widened(x.dtype, lax.stop_gradient(x), self.granularity.spread(scale, x.shape))
        noise = jax.random.uniform(self.rngs(), x.shape, x.dtype) - 0.5
        # A little less than half a step: a value on the grid stays there, however it is rounded.
        dithered = x + (1 - 2.0 ** (self.bits - 22)) * noise * step
        # The sum overflows only beyond the range, where the nearest value is its end.
        return jnp.where(jnp.isfinite(dithered), dithered, x)

    def observe(self, x: jax.Array) -> None:
        """Updates the recorded range by that of an array, if `dynamic` is False.

        The first array sets the range. After that "absmax" uses the wider of the two, "percentile"
        and "moving_average" move by 1 - momentum of the way. What is not finite is left out.

        Args:
            x: array of any shape, float, like those to come.

        Raises:
            ValueError: there are as many ranges as channels, and x has another number of them.
        """
        if self.low is None or self.high is None or self.dynamic is not False:
            return
        found = self._measured(jnp.asarray(x), only_finite=True)
        new = jax.tree.map(self.granularity.for_any_rank, found)
        old = self._recorded or jax.tree.map(jnp.full_like, new, Range(jnp.inf, -jnp.inf))  # type: ignore[arg-type]
        if old.low.shape != new.low.shape:
            raise ValueError(
                f"FakeQuant: an array of shape {jnp.shape(x)} has ranges of shape {new.low.shape}, "
                f"those recorded have shape {old.low.shape}: call observe(x) with arrays alike"
            )
        if not (self._is_averaged or self._is_percentile):
            moved = Range(jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high))
        else:
            start = jax.tree.map(lambda a, b: jnp.where(old.low > old.high, b, a), old, new)
            moved = jax.tree.map(lambda a, b: a + (1 - self.momentum) * (b - a), start, new)
        for end, a, b in ((self.low, old.low, moved.low), (self.high, old.high, moved.high)):
            value = jnp.where(jnp.isnan(new.high), a, b)
            # A moving average is carried through loops, where its dtype may not change.
            end.set_value(value.astype(end.dtype) if self._is_averaged else value)

    def observe_weights(self, w: jax.Array) -> None:
        """Records the range of weights if `dynamic` is False; else each call measures it.

        Args:
            w: array of any shape, float.
        """
        if self.dynamic is None:
            self.dynamic, self.low, self.high = True, nnx.data(None), nnx.data(None)
        self.observe(w)

    def forget(self) -> None:
        """Empties the recorded range."""
        if self.low is not None and self.high is not None:
            self.low.set_value(jnp.full_like(self.low[...], jnp.inf))
            self.high.set_value(jnp.full_like(self.high[...], -jnp.inf))

    @property
    def _is_averaged(self) -> bool:
        return self.calibration == "moving_average"

    @property
    def _is_percentile(self) -> bool:
        return self.calibration == "percentile"

    @property
    def _recorded(self) -> Range | None:
        """The recorded range, which may be empty; None where it has no shape yet."""
        if self.low is None or self.high is None or not self.low.size:
            return None
        return lax.stop_gradient(Range(self.low[...], self.high[...]))

    def _measured(self, x: jax.Array, only_finite: bool = False) -> Range:
        percentile = self.percentile if self._is_percentile else None
        return measured_range(
            x, self.granularity, self.symmetric, percentile, only_finite=only_finite
        )

    def _used_range(self, x: jax.Array) -> Range:
        if self._is_averaged and not self.use_running_average:
            self.observe(x)
        recorded = self._recorded
        empty = True if recorded is None else jnp.any(recorded.low > recorded.high)
        if self.dynamic is False and not self._is_averaged and not is_traced(empty) and empty:
            raise ValueError(
                "FakeQuant: no range has been recorded: call observe(x) with an array like those "
                "to come, or calibrate the model"
            )
        if recorded is None:
            return self._measured(x)
        if not self.granularity.fits(recorded.low.shape, x.shape):
            raise ValueError(
                f"FakeQuant: the recorded ranges have shape {recorded.low.shape}, which does not "
                f"fit an input of shape {x.shape}: call observe(x) with an array like those to come"
            )
        if not is_traced(empty):
            return self._measured(x) if empty else recorded

        def alike(found: Range) -> Range:
            dtype = jnp.result_type(recorded.low, accumulator(x))
            found = jax.tree.map(self.granularity.for_any_rank, found)
            return jax.tree.map(lambda a: varying_like(a.astype(dtype), x), found)

        if self.granularity.axis_name is not None:
            # Devices measure together, or not at all.
            own = self._measured(x)
            return jax.tree.map(lambda a, b: jnp.where(empty, a, b), own, recorded)
        # Not a choice of values: x is measured only where that is used.
        return lax.cond(empty, lambda: alike(self._measured(x)), lambda: alike(recorded))
