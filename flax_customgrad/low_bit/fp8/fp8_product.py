"""A product in 8-bit floats: E4M3 forward, E5M2 for the gradient.

f is the product of the layer in float, linear in x and in w; q(a) are the float8 codes of an array
a for its scale (`fp8_codes`):

    forward   y  = s_x s_w f(q_x, q_w) + b          q_x, q_w = q(x), q(w) in E4M3
    backward  dx = s_g s_w f_x^T(q_g, q_w)          q_g = q(g) in E5M2
              dw = s_x s_g f_w^T(q_x, q_g)
              db = sum g
    kept      q_x, one byte an element, and scales; w, which the caller holds, and not q_w

For a linear layer f(x, w) = x w, f_x^T(g, w) = g w^T and f_w^T(x, g) = x^T g. The transposes are
composed: JAX's VJP of f, which is the backward of the operation `linear` or `einsum` at the codes.

Products of codes are exact in float32, in which they are summed and scaled, and rounded once. A CPU
multiplies no float8, so the codes are widened first; a GPU's XLA may turn that into a product of
float8, which has not been tried. Codes have no derivative: the second derivative is that of the
operands which they stand for.

Of a packed kernel q_w and s_w are given, and with delayed scaling the other scales of that step:
nothing is remembered.

Current scaling takes each scale from the array itself, s_g in the backward. Delayed scaling takes
all three from the last steps, and what the arrays would have asked for is remembered.

Source: arXiv:2209.05433
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.contract.residual_storage import keep_for_second_order, with_derivative_of
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.fp8.fp8_codes import (
    FORWARD_DTYPE,
    GRADIENT_DTYPE,
    Fp8Codes,
    current_scale,
    encode_fp8,
    finite_amax,
    largest_of,
    scale_from_amax,
)
from flax_customgrad.low_bit.fp8.fp8_scaling import (
    DelayedState,
    ScaleSnapshot,
    read_scales,
    record_amax,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.products import MatmulConfig
from flax_customgrad.numerics.sharding import varying_like


@dataclass(frozen=True)
class Fp8Config:
    """The choices of a layer that are not arrays.

    Attributes:
        op: the operation in float, linear in kernel and input, called as
            `op({"kernel": w}, x, *statics)`.
        statics: what else it takes, precision and sharding among it; hashable.
        bias_shape: the shape of the bias that broadcasts to y.
        matmul: dtypes of the computation and of the result.
        margin: how many halvings of a range are left unused.
    """

    op: Callable[..., jax.Array]
    statics: tuple[Any, ...]
    bias_shape: tuple[int, ...]
    matmul: MatmulConfig
    margin: int

    def f(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product in float."""
        return self.op(nnx.State({"kernel": w}), x, *self.statics)


class Residuals(NamedTuple):
    """What the backward of `fp8_product` keeps.

    Attributes:
        params: kernel and bias, which the caller holds.
        q_x: the bits of the codes of x, uint8.
        x: for second derivatives, which alone read it.
        snapshot: the scales.
        amax: of x and of the kernel, for delayed scaling.
        delayed: the state of delayed scaling.
        packed: the codes of a packed kernel.
        config: as it came.
    """

    params: Parameters
    q_x: jax.Array
    x: jax.Array | None
    snapshot: ScaleSnapshot
    amax: tuple[jax.Array, ...]
    delayed: DelayedState | None
    packed: Fp8Codes | None
    config: Fp8Config


@custom_vjp(surrogate=True)
def fp8_product(
    params: Parameters,
    x: jax.Array,
    delayed: DelayedState | None,
    packed: Fp8Codes | None,
    config: Fp8Config,
) -> jax.Array:
    """Computes a product of a kernel and an input in E4M3, and adds a bias.

    Args:
        params: `kernel`, float, and `bias` or no bias.
        x: inputs, float.
        delayed: the state of delayed scaling; None for current scaling, and for a packed kernel.
        packed: the codes of a packed kernel, for which `kernel` has their values; or None.
        config: the product, dtypes and margin.

    Returns:
        Outputs in the dtype of the computation.
    """
    x_, w, b = config.matmul.promote(x, params["kernel"], params.get("bias"))
    s_x, s_w, _ = _scales(x_, w, delayed, packed, config).scales
    wide = accumulator(x_, w)
    q_x = encode_fp8(x_, s_x, FORWARD_DTYPE).astype(wide)
    q_w = _kernel_codes(w, s_w, packed).astype(wide)
    y = config.f(q_x, q_w) * _both(s_x, s_w, wide)
    if b is not None:
        y = y + jnp.reshape(b, config.bias_shape).astype(wide)
    return y.astype(config.matmul.preferred_element_type or x_.dtype)


def _fwd(
    params: Parameters,
    x: jax.Array,
    delayed: DelayedState | None,
    packed: Fp8Codes | None,
    config: Fp8Config,
) -> tuple[jax.Array, Residuals]:
    y = fp8_product(params, x, delayed, packed, config)
    x_, w, _ = config.matmul.promote(x, params["kernel"], params.get("bias"))
    snapshot = _scales(x_, w, delayed, packed, config)
    codes = encode_fp8(x_, snapshot.scales[0], FORWARD_DTYPE)
    q_x = lax.bitcast_convert_type(codes, jnp.uint8)
    amax = () if delayed is None else (finite_amax(x_), finite_amax(w))
    held = keep_for_second_order(x)
    return y, Residuals(params, q_x, held, snapshot, amax, delayed, packed, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None, None]:
    params, config = res.params, res.config
    chex.assert_shape(res.snapshot.scales, (3,))
    chex.assert_type(res.q_x, jnp.uint8)
    s_x, s_w, s_g = res.snapshot.scales
    if res.delayed is None and (res.packed is None or not res.packed.has_all_scales):
        s_g = scale_from_amax(finite_amax(g), largest_of(GRADIENT_DTYPE), 1, config.margin)
        s_g = lax.stop_gradient(s_g)
    elif res.delayed is not None:
        record_amax(res.delayed, res.snapshot, jnp.stack([*res.amax, finite_amax(g)]))
    g, (codes_x, kernel) = wait_for(g, (res.q_x, params["kernel"]))
    x, w, _ = config.matmul.promote(res.x, kernel, params.get("bias"))
    wide = accumulator(g, w)
    codes_x = lax.bitcast_convert_type(codes_x, FORWARD_DTYPE)
    q_x = _of_derivative(codes_x, x, s_x, wide)
    q_w = _of_derivative(_kernel_codes(w, s_w, res.packed), w, s_w, wide)
    q_g = _of_derivative(encode_fp8(g, s_g, GRADIENT_DTYPE), g, s_g, wide)
    # The scales of a device belong to its part of a sum, so the sum comes after them.
    q_x, q_w = varying_like(q_x, q_g), varying_like(q_w, q_g)
    _, transposes = jax.vjp(config.f, q_x, q_w)
    dx, dw = transposes(q_g)
    dx, dw = dx * _both(s_w, s_g, wide), dw * _both(s_x, s_g, wide)
    chex.assert_equal_shape([dx, res.q_x])
    chex.assert_equal_shape([dw, params["kernel"]])
    chex.assert_type([dx, dw], wide)
    grads = {"kernel": dw}
    if "bias" in params:
        db = sum_to_shape(g, config.bias_shape)
        chex.assert_shape(db, config.bias_shape)
        grads["bias"] = jnp.reshape(db, params["bias"].shape)
    return nnx.State(grads), dx, None, None, None


fp8_product.defvjp(_fwd, _bwd)


def _kernel_codes(w: jax.Array, s_w: jax.Array, packed: Fp8Codes | None) -> jax.Array:
    """`q_w`, in E4M3."""
    if packed is None:
        return encode_fp8(w, s_w, FORWARD_DTYPE)
    return lax.bitcast_convert_type(packed.codes, FORWARD_DTYPE)


def _scales(
    x: jax.Array,
    w: jax.Array,
    delayed: DelayedState | None,
    packed: Fp8Codes | None,
    config: Fp8Config,
) -> ScaleSnapshot:
    """The scales of x and of the kernel, and that of g where it is known already."""
    if delayed is not None:
        return read_scales(delayed, config.margin)
    if packed is not None and packed.has_all_scales:
        return ScaleSnapshot(packed.scales, None)
    s_x = current_scale(x, config.margin)
    s_w = current_scale(w, config.margin) if packed is None else packed.kernel_scale
    return ScaleSnapshot(lax.stop_gradient(jnp.stack([s_x, s_w, jnp.ones_like(s_x)])), None)


def _both(a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    """The product of two scales, which a sum of codes that is 0 may be multiplied with."""
    return jnp.minimum(a.astype(wide) * b.astype(wide), jnp.finfo(wide).max)


def _of_derivative(codes: jax.Array, a: jax.Array | None, scale: jax.Array, wide: Any) -> jax.Array:
    """Codes in a wide dtype, with the derivative of what was encoded, a / scale."""
    values = codes.astype(wide)
    if a is None:
        return values
    return with_derivative_of(values, a.astype(wide) / scale.astype(wide))
