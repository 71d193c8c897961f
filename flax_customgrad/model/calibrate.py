"""`calibrate`: sets the ranges and scales of activation quantizers from batches of data.

It runs a copy of the model whose quantizers are watched (`observer`), and each quantizes what it is
called with as one that has observed it, so that the layers after it are calibrated on quantized
values, as they will get them later.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from flax_customgrad.contract.compat import is_outside_of_traces
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.model.observer import Observer
from flax_customgrad.model.tree import layers, set_mode

M = TypeVar("M")


def calibrate(model: M, batches: Iterable[Any], call: Callable[[M, Any], Any] | None = None) -> M:
    """Sets the ranges and scales of a model's activation quantizers from batches.

    A copy of the model is called on each batch, in eval mode. It may be compiled, loop over time or
    over stacked layers, branch, and map over examples. Of a `FakeQuant` the recorded range is the
    one in use from then on: the widest, the average, or the percentile of all batches, whose values
    stay in memory until the end. A learned scale is set by its `observe` from the last batch. What
    was recorded before is forgotten.

    A quantizer with dynamic=True stays dynamic, as do those whose ranges belong to examples, tokens
    or blocks. A weight quantizer takes its range from the weights when the layer is built; that of
    a bias is set from the bias as it is then.

    Args:
        model: a Module with quantizers. Its quantizers are changed in place, and nothing else is.
        batches: the batches that the model is called on, such as a list of arrays; some hundred
            examples are enough.
        call: a function of model and batch that calls the model; `model(batch)` by default.

    Returns:
        The model.

    Raises:
        TypeError: `batches` is an array, whose rows would be taken for batches.
        ValueError: the model has no activation quantizer to calibrate, or no quantizer was called,
            or there is no batch; or it is called inside a transformation.

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
    if isinstance(batches, jax.Array | np.ndarray | nnx.Variable):
        raise TypeError(
            f"calibrate: batches is an array of shape {batches.shape}, and its rows would be taken "
            "for batches: write [array] for one batch, or list(array) for a batch from each row"
        )
    if not is_outside_of_traces():
        raise ValueError(
            "calibrate is called inside a transformation: call it outside. A model has the same "
            "state before it is calibrated, so an abstract one needs none"
        )
    targets = _quantizers_to_calibrate(model)
    observed = nnx.clone(model, graph=True)
    set_mode(observed, "eval")
    observer = Observer(_quantizers_to_calibrate(observed))
    called = False
    for batch in batches:
        called = True
        observed(batch) if call is None else call(observed, batch)  # type: ignore[operator]
        observer.observe()
    if not called:
        raise ValueError("calibrate: there was no batch")
    if not observer.called:
        raise ValueError(
            "calibrate: the call of the model used none of its quantizers; `call` gets a copy of "
            "the model, which it has to call"
        )
    for number, quantizer in observer.results().items():
        _take_over(targets[number], quantizer)
    return model


def _quantizers_to_calibrate(model: Any) -> list[Quantizer]:
    """The quantizers of activations that record or learn something.

    Raises:
        ValueError: there is none, or one would record ranges of examples.
    """
    modules = [module for _, module in layers(model)]
    of_weights = {id(getattr(module, "weight", None)) for module in modules} | {
        id(getattr(module, "quantizer", None)) for module in modules
    }
    quantizers = [m for m in modules if isinstance(m, Quantizer) and id(m) not in of_weights]
    if not quantizers:
        raise ValueError(
            "calibrate: the model has no activation quantizer. Turn its layers into quantized "
            "ones with flax_customgrad.convert(model, rules=...)"
        )
    found = [q for q in quantizers if not (isinstance(q, FakeQuant) and q.dynamic)]
    if not found:
        raise ValueError(
            "calibrate: the activation quantizers of the model are dynamic and measure each array "
            "themselves: leave out dynamic=True, and axis or block where they give examples, "
            "tokens or blocks ranges of their own"
        )
    for quantizer in found:
        granularity = getattr(quantizer, "granularity", None)
        if granularity is not None and granularity.is_per_example:
            raise ValueError(
                f"calibrate: a {type(quantizer).__name__} with axis={granularity.axis} and "
                f"block={granularity.block} has a range for each example, token or block of one "
                "array, which do not fit others: write axis=-1 or axis=None, or leave out "
                "dynamic=False"
            )
    return found


def _take_over(target: Quantizer, quantizer: Quantizer) -> None:
    """Gives a quantizer the state of another of its class."""
    for name, value in vars(quantizer).items():
        held = getattr(target, name, None)
        if isinstance(value, nnx.Variable) and isinstance(held, nnx.Variable):
            held.set_value(value[...])
        elif isinstance(value, nnx.Variable):
            setattr(target, name, value)
    if isinstance(target, FakeQuant):
        target.dynamic = False
