"""What the fp8 layers share: their scaling, and how operands go into the product."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.replaced_matmul import refuse_injected
from flax_customgrad.low_bit.fp8.delayed_scaling import DelayedScaling
from flax_customgrad.low_bit.fp8.fp8_product import Fp8Config, fp8_product
from flax_customgrad.low_bit.quant_layers.quantized_product import LinearOp
from flax_customgrad.numerics.products import MatmulConfig

Scaling = Literal["delayed", "current"]


def set_scaling(layer: Any, scaling: Scaling, history: int, margin: int) -> None:
    """Gives a layer its scaling.

    Args:
        layer: the layer.
        scaling: which.
        history: how many steps delayed scaling remembers.
        margin: how many halvings of a range are left unused.

    Raises:
        ValueError: an argument is out of its range, or an operation is injected.
    """
    name = type(layer).__name__
    refuse_injected(name, layer)
    if scaling not in ("delayed", "current"):
        raise ValueError(f'{name}: scaling={scaling!r} must be "delayed" or "current"')
    if not isinstance(history, int) or history < 1:
        raise ValueError(f"{name}: history={history!r} must be a number of steps, at least 1")
    if not isinstance(margin, int) or not 0 <= margin <= 15:
        raise ValueError(f"{name}: margin={margin!r} must be an integer from 0 to 15")
    layer.scaling = scaling
    layer.margin = margin
    layer.delayed = nnx.data(DelayedScaling(name, history) if scaling == "delayed" else None)


def product(
    layer: Any,
    params: Parameters,
    x: jax.Array,
    op: Callable[..., jax.Array],
    *equation: Any,
    out_sharding: Any,
    bias_shape: tuple[int, ...],
) -> jax.Array:
    """The output of a layer.

    Args:
        layer: what `set_scaling` was called on.
        params: its parameters.
        x: its input.
        op: the operation in float, called as `op(params, x, *equation, how)`.
        *equation: what else it takes.
        out_sharding: sharding of the result, or None.
        bias_shape: the shape of the bias that broadcasts to the output.
    """
    # Of codes: what dtype the result has is decided when they are scaled.
    of = LinearOp(op, (*equation, MatmulConfig(None, layer.precision, None, out_sharding)))
    how = MatmulConfig(layer.dtype, preferred_element_type=layer.preferred_element_type)
    remembered = None if layer.delayed is None else layer.delayed.remembered()
    return fp8_product(params, x, remembered, Fp8Config(of, bias_shape, how, layer.margin))
