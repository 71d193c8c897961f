"""`Observer`: what the quantizers of a model are called with, wherever they are called.

A quantizer that is watched has another class while the model runs. It hands each array to the host,
through `jax.debug.callback`, and writes nothing. So it works under `nnx.jit`, in a loop over time
or over stacked layers, in a branch, and under `nnx.vmap`, where a Variable could not be written:

    number      which quantizer it is; copies that a transformation makes have that of the original
    place       where in a stack of layers it is: an element of a Variable that counts the stack's
                layers, so that a scan over them hands each its own

After a call of the model, what has come in is observed, by each quantizer of a stack for itself.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.layers.stacked import Index, unstack
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer

_Arrays = dict[tuple[int, Index], list[np.ndarray]]


class Observer:
    """Watches quantizers while a model is called, and lets them observe what they were called with.

    Args:
        quantizers: the quantizers, each of one layer or of a stack of layers. What each has
            recorded is forgotten.
    """

    def __init__(self, quantizers: list[Quantizer]):
        self.quantizers = quantizers
        self._classes = [type(quantizer) for quantizer in quantizers]
        self._axes = [quantizer.stack_axes for quantizer in quantizers]
        self._arrays: _Arrays = defaultdict(list)
        self._batches: dict[tuple[int, Index], int] = defaultdict(int)
        watching = {cls: _watching(cls, self._note) for cls in set(self._classes)}
        for number, (quantizer, axes) in enumerate(zip(quantizers, self._axes, strict=True)):
            if isinstance(quantizer, FakeQuant):
                quantizer.dynamic = False
            quantizer.forget()
            set_class(quantizer, watching[type(quantizer)])
            watched: Any = quantizer
            watched.enabled = True
            watched._number = number
            watched._place = nnx.data(_places(quantizer, axes))

    @property
    def called(self) -> list[int]:
        """The numbers of the quantizers that have observed something."""
        return sorted({number for number, _ in self._batches})

    def observe(self) -> None:
        """Lets the quantizers observe what they were called with since the last time."""
        jax.effects_barrier()
        arrays = {key: found for key, found in self._arrays.items() if found}
        for number in sorted({number for number, _ in arrays}):
            quantizer, axes = self.quantizers[number], self._axes[number]
            singles = unstack(self._plain(number), axes)
            for index, single in singles.items():
                if (number, index) in arrays:
                    self._observe_one(single, (number, index), arrays[number, index])
            _assign(quantizer, singles, axes)
        for key in arrays:
            # The percentile of all batches is not one of the percentiles of each.
            if not _needs_all(self.quantizers[key[0]]):
                self._arrays[key].clear()

    def _observe_one(
        self, quantizer: Any, key: tuple[int, Index], arrays: list[np.ndarray]
    ) -> None:
        self._batches[key] += 1
        if _needs_all(quantizer):
            quantizer.forget()
        if isinstance(quantizer, FakeQuant):
            # All batches count alike, until there are as many as the average goes back.
            quantizer.momentum = min(quantizer.momentum, 1 - 1 / self._batches[key])
            # What came from the devices is together here.
            quantizer.granularity = replace(quantizer.granularity, axis_name=None)
        for array in _joined(arrays, quantizer):
            quantizer.observe(jnp.asarray(array))

    def _plain(self, number: int) -> Quantizer:
        """A copy of a quantizer that is not watched."""
        quantizer: Any = nnx.clone(self.quantizers[number], graph=True)
        set_class(quantizer, self._classes[number])
        del quantizer._place, quantizer._number
        return quantizer

    def results(self) -> dict[int, Quantizer]:
        """The quantizers that have observed something, as they are now, by number."""
        return {number: self._plain(number) for number in self.called}

    def _note(self, number: int, place: Any, x: Any) -> None:
        axes = self._axes[number]
        index = tuple(map(int, np.unravel_index(int(place), axes))) if axes else ()
        self._arrays[number, index].append(np.asarray(x))


def _watching(cls: type[Quantizer], note: Any) -> type[Quantizer]:
    """A subclass that passes on what it gets, and quantizes it as one that observed it."""

    class Watching(cls):
        _number: int
        _place: nnx.Variable[jax.Array] | None

        def quantize(self, x: jax.Array) -> Codes:
            x = jnp.asarray(x)
            place = 0 if self._place is None else self._place[...]
            jax.debug.callback(partial(note, self._number), place, jax.lax.stop_gradient(x))
            observed = nnx.clone(self, graph=True)
            set_class(observed, cls)
            observed.observe(x)
            return observed.quantize(x)

    return Watching


def _places(quantizer: Quantizer, axes: Index) -> nnx.Variable[jax.Array] | None:
    """The places of a stack, in a Variable that loops treat like those of the quantizer."""
    if not axes:
        return None
    own = next(v for v in vars(quantizer).values() if isinstance(v, nnx.Variable))
    # Of float32, as a Param is that may be differentiated.
    return type(own)(jnp.arange(np.prod(axes), dtype=jnp.float32).reshape(axes))


def _needs_all(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, FakeQuant) and quantizer.calibration == "percentile"


def _joined(arrays: list[np.ndarray], quantizer: Any) -> list[np.ndarray]:
    """What a quantizer is called with in one call of a model, as one array where it can be one."""
    if len(arrays) == 1:
        return arrays
    channels = getattr(getattr(quantizer, "granularity", None), "axis", None)
    if channels is None:
        return [np.concatenate([array.ravel() for array in arrays])]
    # An example that comes without its batch has channels, counted from the end, on its first axis.
    if all(-array.ndim in channels for array in arrays):
        return [np.stack(arrays)]
    if len({array.shape[1:] for array in arrays}) == 1:
        return [np.concatenate(arrays)]
    return arrays


def _assign(stacked: Quantizer, singles: dict[Index, Quantizer], axes: Index) -> None:
    """Writes the state of the quantizers of a stack into it."""
    for name, variable in vars(next(iter(singles.values()))).items():
        if not isinstance(variable, nnx.Variable):
            continue
        values = [getattr(single, name)[...] for single in singles.values()]
        # Of a layer that was not called the ranges have no shape yet.
        shape = max((value.shape for value in values), key=np.prod)
        unset = {"low": jnp.inf, "high": -jnp.inf}.get(name, 1)
        values = [v if v.shape == shape else jnp.full(shape, unset, v.dtype) for v in values]
        value = jnp.stack(values).reshape(*axes, *shape)
        setattr(stacked, name, getattr(stacked, name).replace(value))
