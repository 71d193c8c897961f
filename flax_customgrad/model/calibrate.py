"""`calibrate`: sets the ranges and scales of activation quantizers from batches of data.

During calibration each quantizer has a class that observes an array before it quantizes it, so that
the layers after it are calibrated on quantized values, as they will get them later.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.model.convert import layers

M = TypeVar("M")


def calibrate(model: M, batches: Iterable[Any], call: Callable[[M, Any], Any] | None = None) -> M:
    """Sets the ranges and scales of a model's activation quantizers from batches.

    The model is called on each batch, in eval mode and not compiled. A `FakeQuant` keeps the range
    that it records, even if it was dynamic before; a learned scale is set by its `observe` from the
    last batch. A weight quantizer takes its range from the weights when the layer is built.

    Args:
        model: a Module with quantizers. It is changed in place.
        batches: the batches that the model is called on; some hundred examples are enough.
        call: a function of model and batch that calls the model; `model(batch)` by default.

    Returns:
        The model, in the train or eval mode that it was in.

    Raises:
        ValueError: the model has no activation quantizer, or no quantizer was called, or there is
            no batch.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> rules = {nnx.Linear: lambda linear: fcg.QuantLinear.from_layer(
        ...     linear, weight=fcg.FakeQuant(8, axis=-1), activation=fcg.FakeQuant(8))}
        >>> model = fcg.convert(model, rules=rules)
        >>> model = fcg.calibrate(model, [jnp.ones((2, 4)), 3 * jnp.ones((2, 4))])
        >>> model.activation.high[...]
        Array(3., dtype=float32)
    """
    quantizers = _activation_quantizers(model)
    if not quantizers:
        raise ValueError(
            "calibrate: the model has no activation quantizer. Turn its layers into quantized "
            "ones with flax_customgrad.convert(model, rules=...)"
        )
    seen: set[int] = set()
    observing = {cls: _observing_class(cls, seen) for cls in map(type, quantizers)}
    before = [(q, type(q), getattr(q, "dynamic", False)) for q in quantizers]
    modes = _modes(model)
    called = False
    try:
        for module, _ in modes:
            module.eval()
        for quantizer, cls, _ in before:
            set_class(quantizer, observing[cls])
            if isinstance(quantizer, FakeQuant):
                quantizer.dynamic = False
        for batch in batches:
            called = True
            model(batch) if call is None else call(model, batch)  # type: ignore[operator]
    finally:
        for quantizer, cls, dynamic in before:
            set_class(quantizer, cls)
            if isinstance(quantizer, FakeQuant) and id(quantizer) not in seen:
                quantizer.dynamic = dynamic
        for module, mode in modes:
            for name, value in mode.items():
                setattr(module, name, value)
    if not called:
        raise ValueError("calibrate: there was no batch")
    if not seen:
        raise ValueError("calibrate: the call of the model used none of its quantizers")
    return model


def _activation_quantizers(model: Any) -> list[Quantizer]:
    modules = [module for _, module in layers(model)]
    weight_quantizers = {id(getattr(module, "weight", None)) for module in modules}
    return [m for m in modules if isinstance(m, Quantizer) and id(m) not in weight_quantizers]


def _modes(model: Any) -> list[tuple[nnx.Module, dict[str, Any]]]:
    """The attributes of each module that `eval` changes, and their values."""
    names = ("deterministic", "use_running_average")
    return [
        (module, {name: getattr(module, name) for name in names if hasattr(module, name)})
        for _, module in layers(model)
    ]


def _observing_class(cls: type[Quantizer], seen: set[int]) -> type[Quantizer]:
    """A subclass that observes an array before it quantizes it, and notes its id in `seen`."""

    class Observing(cls):
        def quantize(self, x: jax.Array) -> Codes:
            seen.add(id(self))
            self.observe(x)
            return super().quantize(x)

    return Observing
