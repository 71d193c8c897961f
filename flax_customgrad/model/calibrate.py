"""`calibrate`: every quantizer of a model's activations observes what it will be given.

While it does, a quantizer is of a class that observes an array before it quantizes it, so that the
layers behind see what they will see later: values that are quantized already.
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

    The model is called on each batch, in eval mode and not compiled. A `FakeQuant` records the
    range from then on, one that was dynamic too; a learned scale becomes what its `observe` makes
    of the last batch. Quantizers of weights observed their weights when the layers were made.

    Args:
        model: a Module with quantizers, changed in place.
        batches: what the model is called on, one after another; some hundred examples will do.
        call: how to call it, if not as `model(batch)`: a function of both.

    Returns:
        The model, in the mode that it was in.

    Raises:
        ValueError: the model has no quantizer of activations, or none was called, or there is no
            batch.

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
    found = _of_activations(model)
    if not found:
        raise ValueError(
            "calibrate: the model has no quantizer of activations. Turn its layers into quantized "
            "ones with flax_customgrad.convert(model, rules=...)"
        )
    seen: set[int] = set()
    observing = {kind: _observing(kind, seen) for kind in map(type, found)}
    before = [(q, type(q), getattr(q, "dynamic", False)) for q in found]
    modes = _modes(model)
    called = False
    try:
        for module, _ in modes:
            module.eval()
        for quantizer, kind, _ in before:
            set_class(quantizer, observing[kind])
            if isinstance(quantizer, FakeQuant):
                quantizer.dynamic = False
        for batch in batches:
            called = True
            model(batch) if call is None else call(model, batch)  # type: ignore[operator]
    finally:
        for quantizer, kind, dynamic in before:
            set_class(quantizer, kind)
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


def _of_activations(model: Any) -> list[Quantizer]:
    modules = [module for _, module in layers(model)]
    of_weights = {id(getattr(module, "weight", None)) for module in modules}
    return [m for m in modules if isinstance(m, Quantizer) and id(m) not in of_weights]


def _modes(model: Any) -> list[tuple[nnx.Module, dict[str, Any]]]:
    """What `eval` changes of each module."""
    names = ("deterministic", "use_running_average")
    return [
        (module, {name: getattr(module, name) for name in names if hasattr(module, name)})
        for _, module in layers(model)
    ]


def _observing(kind: type[Quantizer], seen: set[int]) -> type[Quantizer]:
    """A quantizer that observes an array before it quantizes it."""

    class Observing(kind):
        def quantize(self, x: jax.Array) -> Codes:
            seen.add(id(self))
            self.observe(x)
            return super().quantize(x)

    return Observing
