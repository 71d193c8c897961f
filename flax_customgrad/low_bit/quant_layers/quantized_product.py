"""Products of quantized operands, which keep the codes of both and no float copy.

    forward   y  = f(W^, x^) + b      f linear in each: a product, einsum or convolution
    backward  those of f, at what is kept
    kept      "quantized": the codes of W^ and x^, decoded again    the derivative of the forward
              "original":  W and x as they came                     the convention of qwix and AQT

What else f has for parameters, such as b, is kept as it came.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.quantizers.codes import Codes, KeptCodes, keep, restore


@dataclass(frozen=True)
class LinearOp:
    """A map of parameters and an input, with a backward of its own.

    Attributes:
        op: an operation, linear in kernel and input, called as `op({"kernel": W, "bias": b}, x,
            *statics)`.
        statics: the choices that are not arrays.
        name: what the kernel is called.
    """

    op: Callable[..., jax.Array]
    statics: tuple[Any, ...]
    name: str = "kernel"

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The output, y."""
        return self.op(params, x, *self.statics)


class Residuals(NamedTuple):
    """What the backward keeps; an operand that is an array, the caller holds anyway."""

    kernel: KeptCodes | jax.Array
    x: KeptCodes | jax.Array
    others: Parameters
    of: LinearOp


@custom_vjp(surrogate=True)
def quantized_product(
    params: Parameters,
    x: jax.Array,
    kernel_kept: Codes | jax.Array,
    x_kept: Codes | jax.Array,
    of: LinearOp,
) -> jax.Array:
    """Applies a map to quantized operands.

    Args:
        params: the kernel, quantized, and others such as `bias`; float.
        x: the input, quantized; float.
        kernel_kept: what the backward takes for the kernel: its codes, or an array like it.
        x_kept: what the backward takes for the input.
        of: the map.

    Returns:
        What the map makes of kernel and input.
    """
    return of(params, x)


def _fwd(
    params: Parameters,
    x: jax.Array,
    kernel_kept: Codes | jax.Array,
    x_kept: Codes | jax.Array,
    of: LinearOp,
) -> tuple[jax.Array, Residuals]:
    kernel, x_held = (keep(a) if isinstance(a, Codes) else a for a in (kernel_kept, x_kept))
    others = nnx.State({name: p for name, p in params.items() if name != of.name})
    return of(params, x), Residuals(kernel, x_held, others, of)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    kernel, x = (restore(a) if isinstance(a, KeptCodes) else a for a in (res.kernel, res.x))
    # Of the forward only its residuals are read, which are these operands: XLA drops the rest.
    _, pull = jax.vjp(res.of, nnx.State({**res.others, res.of.name: kernel}), x)
    return *pull(g), None, None, None


quantized_product.defvjp(_fwd, _bwd)
