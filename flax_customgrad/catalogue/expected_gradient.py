"""The expected gradient of an example: that of a formula, or of the layer of nnx itself."""

import inspect
from functools import partial
from typing import Any

from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.registry.entry import Entry


def expected(entry: Entry, example: tuple[Any, ...]) -> dict[str, Any]:
    """The keywords `reference` or `formula` of `check_vjp` for an example of an entry.

    Args:
        entry: the entry of the layer.
        example: what one of the entry's makers of examples returned for `entry.module`.

    Returns:
        The formula of a surrogate; for a drop-in the layer or function of nnx itself, so that a
        wrong value is found too; nothing for any other, which JAX differentiates itself, nor for a
        function with arguments that nnx's does not have.
    """
    first = example[0]
    keywords = first.keywords if isinstance(first, partial) else {}
    if entry.formula is not None:
        return {"formula": partial(entry.formula, **keywords) if keywords else entry.formula}
    if entry.reference is None:
        return {}
    if entry.is_function:
        if not keywords.keys() <= inspect.signature(entry.reference).parameters.keys():
            return {}
        return {"reference": partial(entry.reference, **keywords)}
    call = _call if isinstance(first, nnx.Module) else first
    return {"reference": lambda layer, *inputs: call(_to_nnx(entry, layer), *inputs)}


def _to_nnx(entry: Entry, layer: Any) -> Any:
    """Turns a layer of this library into the layer of nnx that it replaces."""
    to_layer = getattr(entry.module, "to_layer", None)
    if to_layer is not None:
        return to_layer(layer)
    set_class(layer, entry.reference)  # type: ignore[arg-type]
    # So do the layers that it holds: LoRALinear holds a LoRA.
    for _, part in nnx.iter_modules(layer):
        of_nnx = getattr(nnx, type(part).__name__, type(part))
        if isinstance(of_nnx, type) and isinstance(part, of_nnx):
            set_class(part, of_nnx)
    return layer


def _call(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)
