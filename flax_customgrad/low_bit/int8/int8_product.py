"""Products in int8, of an input and a kernel: the operation behind `Int8Linear` and `Int8Conv`.

Codes q and scales s are those of `int8_codes`; `x_hat = q_x s_x` and `w_hat = q_w s_w` are what
they stand for. The input has a scale for each row or one for all, the kernel one for each output
channel or one for all. `.` is the product of the layer, of matrices or a convolution, and `.^T` its
transposes, for x and for w.

    forward     y  = (q_x . q_w) s_x s_w + b                     int8, summed in int32

    backward    float         dx = g .^T w_hat                   in float
                              dw = x_hat .^T g
                int8          dx = (q_u .^T q_w) s_u             u = g s_w, a scale a row
                              dw = (q_x .^T q_v) s_v             v = g s_x, a scale a channel
                switchback    dx as in int8, dw = x .^T g        arXiv:2304.13013
                              db = sum g                         in each

    kept        q_x and s_x: a byte an element; x with residuals="original", and for switchback

A scale can only be taken out of a sum that does not run over its axis. The sum of dx runs over
output channels, that of dw over rows: so the scales of the kernel and the input are folded into g
before it is rounded, and g is rounded twice (arXiv:2105.03536). The codes of the kernel are
computed again, which XLA shares with the forward where both are in one program. Those of a packed
kernel are given, and there is no w: w_hat stands in for it everywhere.

What is in float is composed: JAX's VJP of the float product, which is the backward of the operation
`linear` or `convolution`. With backward="float" it is the derivative of the forward, with rounding
taken for the identity; with residuals="original" x and w stand in for x_hat and w_hat, as in the
float backwards of qwix and AQT. The derivatives of int8 are those of its formula, with every
rounding taken for the identity.

Source: arXiv:2105.03536
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.contract.residual_storage import with_derivative_of
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.bilinear_op import BilinearOp, by_channel, product_of_codes
from flax_customgrad.low_bit.int8.int8_codes import Int8Array, encode_int8
from flax_customgrad.numerics.accumulation import total


@dataclass(frozen=True)
class Int8Rounding:
    """What is rounded to int8, and with which scales.

    Attributes:
        backward: "float", "int8" or "switchback".
        residuals: "quantized" keeps the codes of the input, "original" the input.
        activation_scale: "per_row", or "per_tensor".
        weight_scale: "per_channel", or "per_tensor".
    """

    backward: str
    residuals: str
    activation_scale: str
    weight_scale: str


class Residuals(NamedTuple):
    """What the backward of `int8_product` keeps.

    Attributes:
        params: kernel and bias, which the caller holds.
        x: q_x and s_x, or x.
        dtype: of x.
        packed: q_w and s_w of a packed kernel, or None.
        key: what g is rounded with, or None.
        op: the product.
        rounding: what is rounded.
    """

    params: Parameters
    x: Int8Array | jax.Array
    dtype: Any
    packed: Int8Array | None
    key: jax.Array | None
    op: BilinearOp
    rounding: Int8Rounding


@custom_vjp(surrogate=True)
def int8_product(
    params: Parameters,
    x: jax.Array,
    packed: Int8Array | None,
    key: jax.Array | None,
    op: BilinearOp,
    rounding: Int8Rounding,
) -> jax.Array:
    """Multiplies in int8.

    Args:
        params: `kernel`, whose last axis is that of the output channels, float; `bias`, or none.
        x: the input, float.
        packed: the codes of a packed kernel; None to encode the kernel.
        key: a key of `jax.random` to round g stochastically; None to round to the nearest.
        op: the product.
        rounding: what is rounded.

    Returns:
        The output of the product, in the dtype of the computation.
    """
    x, w, b = op.matmul.promote(x, params["kernel"], params.get("bias"))
    int8_w = packed or encode_kernel(w, rounding)
    return product_of_codes(op, _encode_input(x, op, rounding), int8_w, b, x.dtype)


def _fwd(
    params: Parameters,
    x: jax.Array,
    packed: Int8Array | None,
    key: jax.Array | None,
    op: BilinearOp,
    rounding: Int8Rounding,
) -> tuple[jax.Array, Residuals]:
    kept = x
    if rounding.residuals == "quantized":
        promoted, _ = op.matmul.promote(x, params["kernel"])
        kept = _encode_input(promoted, op, rounding)
    y = int8_product(params, x, packed, key, op, rounding)
    return y, Residuals(params, kept, x.dtype, packed, key, op, rounding)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None, None, None]:
    op, backward = res.op, res.rounding.backward
    g, codes, x, w = _wait(res, g)
    int8_w = res.packed or encode_kernel(op.matmul.promote(x, w)[1], res.rounding)
    q_w, s_w, _ = int8_w
    dims = chex.Dimensions(O=w.shape[-1])
    chex.assert_shape(g, (..., *dims["O"]))
    chex.assert_rank(g, x.ndim)
    chex.assert_equal_shape([q_w, w])
    key_u, key_v = (None, None) if res.key is None else jax.random.split(res.key)

    def in_float(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[Any, jax.Array]:
        _, transposes = jax.vjp(op, nnx.State({**res.params, "kernel": w}), x)
        return transposes(g)

    if backward == "float":
        w_hat = w if res.rounding.residuals == "original" else int8_w.values(w.dtype)
        return *in_float(x, w_hat, g), None, None, None, None

    u = g * by_channel(s_w)
    q_u, s_u, _ = int8_u = encode_int8(u, op.row_axes(g.ndim), key_u)
    dx = op.input_gradient(x, q_w, q_u, s_u.dtype) * s_u
    chex.assert_equal_shape([dx, x])
    dx = _with_derivative(
        dx, lambda: in_float(x, int8_w.multiples(w.dtype), int8_u.values(g.dtype))[1]
    )
    if backward == "switchback":
        return in_float(x, w, g)[0], dx, None, None, None, None

    assert codes is not None
    q_x, s_x, _ = int8_x = codes
    v = g * s_x
    q_v, s_v, _ = int8_v = encode_int8(v, _all_but_last(g.ndim), key_v)
    dw = op.kernel_gradient(q_x, w, q_v, s_v.dtype) * by_channel(s_v)
    chex.assert_type([q_x, q_w, q_u, q_v], jnp.int8)
    chex.assert_equal_shape([dw, w])
    dw = _with_derivative(
        dw, lambda: in_float(int8_x.multiples(res.dtype), w, int8_v.values(g.dtype))[0]["kernel"]
    )
    grads = {"kernel": dw}
    if "bias" in res.params:
        db = grads["bias"] = total(g, _all_but_last(g.ndim))
        chex.assert_shape([db, res.params["bias"]], dims["O"])
    return nnx.State(grads), dx, None, None, None, None


int8_product.defvjp(_fwd, _bwd)


def _wait(res: Residuals, g: jax.Array) -> tuple[jax.Array, Int8Array | None, jax.Array, jax.Array]:
    """The cotangent; and the codes of x, if any, x or x_hat, and the kernel, which wait for it."""
    kernel = res.params["kernel"]
    if not isinstance(res.x, Int8Array):
        g, kernel = wait_for(g, kernel)
        return g, None, res.x, kernel
    g, (q, scale, kernel) = wait_for(g, (res.x.codes, res.x.scale, kernel))
    codes = res.x._replace(codes=q, scale=scale)
    return g, codes, codes.values(res.dtype), kernel


def _encode_input(x: jax.Array, op: BilinearOp, rounding: Int8Rounding) -> Int8Array:
    return encode_int8(x, op.row_axes(x.ndim) if rounding.activation_scale == "per_row" else None)


def encode_kernel(kernel: jax.Array, rounding: Int8Rounding) -> Int8Array:
    """Quantizes a kernel.

    Args:
        kernel: array whose last axis is that of the output channels, float.
        rounding: with which scales.
    """
    channel = rounding.weight_scale == "per_channel"
    return encode_int8(kernel, _all_but_last(kernel.ndim) if channel else None)


def _all_but_last(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim - 1))


def _with_derivative(rounded: jax.Array, in_float: Callable[[], jax.Array]) -> jax.Array:
    """A product in int8 with the derivative of the same in float, for second derivatives.

    Outside of a trace there are none, and no XLA to drop the product in float.
    """
    if not is_traced(rounded):
        return rounded
    product = in_float()
    return with_derivative_of(rounded.astype(product.dtype), product)
