"""Products in int8, of an input and a kernel: the operation behind `Int8Linear` and `Int8Conv`.

Codes q and scales s are those of `codes`; x^ = q_x s_x and W^ = q_W s_W are what they stand for.
The input has a scale for each row or one for all, the kernel one for each output channel or one for
all. `.` is the map of the layer, a product or a convolution, and .^T its transposes.

    forward     y  = (q_x . q_W) s_x s_W + b                     int8, summed in int32

    backward    float         dx = g .^T W^                      in float
                              dW = x^ .^T g
                int8          dx = (q_u .^T q_W) s_u             u = g s_W, a scale a row
                              dW = (q_x .^T q_v) s_v             v = g s_x, a scale a channel
                switchback    dx as in int8, dW = x .^T g        arXiv:2304.13013
                              db = sum g                         in each

    kept        q_x and s_x: a byte an element; x with residuals="original", and for switchback

A scale can only be taken out of a sum that does not run over its axis. The sum of dx runs over
output channels, that of dW over rows: so the scales of the kernel and the input are folded into g
before it is rounded, and g is rounded twice (arXiv:2105.03536). The codes of the kernel are
computed again, which XLA shares with the forward where both are in one program. Those of a packed
kernel are given, and there is no W: W^ stands in for it everywhere.

float is the derivative of the forward with rounding taken for the identity. With
residuals="original" x and W stand in for x^ and W^, as in the float backwards of qwix and AQT. The
derivatives of int8 are those of its formula, with every rounding taken for the identity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.residual_storage import with_derivative_of
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.int8_codes import Int8, encode
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.products import MatmulConfig


@dataclass(frozen=True)
class Rounding:
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


class Int8Op(Protocol):
    """A map of an input and a kernel, linear in each, of floats and of codes.

    The methods take codes of the input x, of the kernel w and of the output's cotangent g, and
    return sums of products, exact where `wide` holds them. Each takes all three that there are, if
    only for their shapes.
    """

    @property
    def arithmetic(self) -> MatmulConfig:
        """dtype, precision and sharding."""
        ...

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The map of floats, with its own gradient."""
        ...

    def row(self, ndim: int) -> Sequence[int]:
        """The axes of a row, of an input or an output with so many axes."""
        ...

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """The map, x . w."""
        ...

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The transpose for x: g .^T w."""
        ...

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The transpose for w: x .^T g."""
        ...


class Residuals(NamedTuple):
    """What the backward of `int8_product` keeps."""

    params: Parameters
    x: Int8 | jax.Array
    dtype: Any
    packed: Int8 | None
    key: jax.Array | None
    of: Int8Op
    rounding: Rounding


@custom_vjp(surrogate=True)
def int8_product(
    params: Parameters,
    x: jax.Array,
    packed: Int8 | None,
    key: jax.Array | None,
    of: Int8Op,
    rounding: Rounding,
) -> jax.Array:
    """Multiplies in int8.

    Args:
        params: `kernel`, whose last axis is that of the output channels, float; `bias`, or none.
        x: the input, float.
        packed: the codes of a packed kernel; None to encode the kernel.
        key: a key of `jax.random` to round g stochastically; None to round to the nearest.
        of: the map.
        rounding: what is rounded.

    Returns:
        The output of the map, in the dtype of the computation.
    """
    how = of.arithmetic
    x, kernel, bias = how.promote(x, params["kernel"], params.get("bias"))
    a, w = _input(x, of, rounding), packed or encode_kernel(kernel, rounding)
    y = of.output(a.codes, w.codes, a.scale.dtype) * _by_channel(w.scale) * a.scale
    dtype = how.preferred_element_type or x.dtype
    if bias is None:
        return y.astype(dtype)
    return (y + lax.expand_dims(bias, range(y.ndim - 1))).astype(jnp.result_type(dtype, bias))


def _fwd(
    params: Parameters,
    x: jax.Array,
    packed: Int8 | None,
    key: jax.Array | None,
    of: Int8Op,
    rounding: Rounding,
) -> tuple[jax.Array, Residuals]:
    kept = x
    if rounding.residuals == "quantized":
        promoted, _ = of.arithmetic.promote(x, params["kernel"])
        kept = _input(promoted, of, rounding)
    y = int8_product(params, x, packed, key, of, rounding)
    return y, Residuals(params, kept, x.dtype, packed, key, of, rounding)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    of, backward = res.of, res.rounding.backward
    kernel = res.params["kernel"]
    x = res.x.values(res.dtype) if isinstance(res.x, Int8) else res.x
    w = res.packed or encode_kernel(of.arithmetic.promote(x, kernel)[1], res.rounding)
    in_rows, in_channels = (None, None) if res.key is None else jax.random.split(res.key)

    def in_float(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[Any, jax.Array]:
        _, pull = jax.vjp(of, nnx.State({**res.params, "kernel": kernel}), x)
        return pull(g)

    if backward == "float":
        exact = kernel if res.rounding.residuals == "original" else w.values(kernel.dtype)
        return *in_float(x, exact, g), None, None, None, None

    u = encode(g * _by_channel(w.scale), of.row(g.ndim), in_rows)
    dx = of.input_gradient(x, w.codes, u.codes, u.scale.dtype) * u.scale
    chex.assert_equal_shape([dx, x])
    dx = _deriving(dx, lambda: in_float(x, w.multiples(kernel.dtype), u.values(g.dtype))[1])
    if backward == "switchback":
        return in_float(x, kernel, g)[0], dx, None, None, None, None

    assert isinstance(res.x, Int8)
    a = res.x
    v = encode(g * a.scale, _all_but_last(g.ndim), in_channels)
    sums = of.kernel_gradient(a.codes, kernel, v.codes, v.scale.dtype)
    dkernel = sums * _by_channel(v.scale)
    chex.assert_equal_shape([dkernel, kernel])
    grads = {
        "kernel": _deriving(
            dkernel,
            lambda: in_float(a.multiples(res.dtype), kernel, v.values(g.dtype))[0]["kernel"],
        )
    }
    if "bias" in res.params:
        grads["bias"] = total(g, _all_but_last(g.ndim))
        chex.assert_equal_shape([grads["bias"], res.params["bias"]])
    return nnx.State(grads), dx, None, None, None, None


int8_product.defvjp(_fwd, _bwd)


def _input(x: jax.Array, of: Int8Op, rounding: Rounding) -> Int8:
    return encode(x, of.row(x.ndim) if rounding.activation_scale == "per_row" else None)


def encode_kernel(kernel: jax.Array, rounding: Rounding) -> Int8:
    """Quantizes a kernel.

    Args:
        kernel: array whose last axis is that of the output channels, float.
        rounding: with which scales.
    """
    channel = rounding.weight_scale == "per_channel"
    return encode(kernel, _all_but_last(kernel.ndim) if channel else None)


def _all_but_last(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim - 1))


def _by_channel(scale: jax.Array) -> jax.Array:
    """A scale along the last axis, or of everything, as it broadcasts to any array."""
    return lax.squeeze(scale, _all_but_last(scale.ndim))


def _deriving(rounded: jax.Array, of: Callable[[], jax.Array]) -> jax.Array:
    """A product in int8 with the derivative of the same in float, for second derivatives.

    Outside of a trace there are none, and no XLA to drop the product in float.
    """
    if not is_traced(rounded):
        return rounded
    in_float = of()
    return with_derivative_of(rounded.astype(in_float.dtype), in_float)
