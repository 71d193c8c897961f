"""`quantized_product`: an operation of quantized operands, which keeps their codes and no floats.

    forward   y  = f(W_q, x_q) + b       f linear in each operand: a product, einsum or convolution
                 = f(q_w, q_x) s_w s_x + b    of integers, where `integer_product` says so
    backward  dW_q, db, dx_q = the backward of f, at what is kept; g is its cotangent
    kept      "quantized": the codes of W_q and x_q, decoded again   the derivative of the forward
              "original":  W and x as they came                      the convention of qwix and AQT

The backward is composed: it is JAX's VJP of `f`, an operation of this library with a hand-written
backward of its own. What else f has for parameters, such as b, is kept as it came.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.quant_layers.integer_product import IntegerProduct
from flax_customgrad.low_bit.quantizers.codes import Codes, PackedCodes, pack_codes, unpack_codes
from flax_customgrad.numerics.sharding import varying_like


@dataclass(frozen=True)
class LinearOp:
    """An operation of a kernel and an input, linear in each, with a backward of its own.

    Attributes:
        op: the operation, called as `op({"kernel": W, "bias": b}, x, *statics)`.
        statics: its arguments that are not arrays.
        kernel: the name of the kernel among the parameters.
    """

    op: Callable[..., jax.Array]
    statics: tuple[Any, ...]
    kernel: str = "kernel"

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """Applies the operation."""
        return self.op(params, x, *self.statics)


class Residuals(NamedTuple):
    """What the backward keeps; an operand that is an array, the caller holds anyway."""

    kernel: PackedCodes | jax.Array
    x: PackedCodes | jax.Array
    others: Parameters
    f: LinearOp


@custom_vjp(surrogate=True)
def quantized_product(
    params: Parameters,
    x: jax.Array,
    kernel_kept: Codes | jax.Array,
    x_kept: Codes | jax.Array,
    integers: IntegerProduct | None,
    f: LinearOp,
) -> jax.Array:
    """Applies a linear operation to quantized operands.

    Args:
        params: the quantized kernel, and others such as `bias`; float, of shapes that `f` takes.
        x: the quantized input, float, of a shape that `f` takes.
        kernel_kept: what the backward takes for the kernel, its codes or an array like it.
        x_kept: what the backward takes for the input, its codes or an array like it.
        integers: the product of the integers, which is the output; None to multiply the floats.
        f: the operation.

    Returns:
        The output of `f`.
    """
    return f(params, x) if integers is None else integers(params, x, f.kernel)


def _fwd(
    params: Parameters,
    x: jax.Array,
    kernel_kept: Codes | jax.Array,
    x_kept: Codes | jax.Array,
    integers: IntegerProduct | None,
    f: LinearOp,
) -> tuple[jax.Array, Residuals]:
    # In a shard_map the gradient goes where the array lives that it is taken at: the operand's.
    kernel, x_ = (
        pack_codes(kept) if isinstance(kept, Codes) else varying_like(kept, operand)
        for kept, operand in ((kernel_kept, params[f.kernel]), (x_kept, x))
    )
    others = nnx.State({name: p for name, p in params.items() if name != f.kernel})
    # Integers have no derivative: for a second one y has that of this function.
    args = (params, x, kernel_kept, x_kept, integers, f)
    y = f(params, x) if integers is None else quantized_product(*args)
    return y, Residuals(kernel, x_, others, f)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    kept = res.kernel, res.x
    g, codes = wait_for(g, [a.packed if isinstance(a, PackedCodes) else None for a in kept])
    kernel, x = (
        unpack_codes(a._replace(packed=packed)) if isinstance(a, PackedCodes) else a
        for a, packed in zip(kept, codes, strict=True)
    )
    # Of this forward only its residuals are read, which are these operands: XLA drops the rest.
    y, pull = jax.vjp(res.f, nnx.State({**res.others, res.f.kernel: kernel}), x)
    # What is kept has the shapes and dtypes of the operands.
    chex.assert_shape(g, y.shape)
    chex.assert_type(g, y.dtype)
    dparams, dx = pull(g)
    return dparams, dx, None, None, None, None


quantized_product.defvjp(_fwd, _bwd)
