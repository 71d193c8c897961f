"""A product in 8-bit floats: E4M3 forward, E5M2 for the gradient, arXiv:2209.05433.

Written for a linear layer; q(x) are the codes of x for a scale s, float8, and f is linear in each
operand:

    forward   y  = s_x s_W f(q(x), q(W)) + b
    backward  dx = s_g s_W q(g) q(W)^T,  dW = s_x s_g q(x)^T q(g),  db = sum g
    kept      q(x), one byte an element, and scales; W, which the caller holds, and not q(W)

Products of codes are exact in float32, in which they are summed and scaled, and rounded once. A CPU
multiplies no float8, so the codes are widened first; a GPU's XLA may turn that into a product of
float8, which has not been tried. Codes have no derivative: the second derivative is that of the
operands which they stand for.

Current scaling takes each scale from the array itself, that of g in the backward. Delayed scaling
takes all three from the last steps, and what the arrays would have asked for is remembered.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract import residual_storage as kept
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.fp8.delayed_scaling import (
    Remembered,
    ScaleSnapshot,
    read_scales,
    record_amax,
)
from flax_customgrad.low_bit.fp8.fp8_formats import E4M3, E5M2, amax, scale_of
from flax_customgrad.low_bit.quant_layers.quantized_product import LinearOp
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.products import MatmulConfig
from flax_customgrad.numerics.sharding import varying_like


@dataclass(frozen=True)
class Fp8Config:
    """The choices that are not arrays.

    Attributes:
        of: the product, linear in kernel and input.
        bias_shape: the shape of the bias that broadcasts to y.
        how: dtypes; precision and sharding are in `of`.
        margin: how many halvings of a range are left unused.
    """

    of: LinearOp
    bias_shape: tuple[int, ...]
    how: MatmulConfig
    margin: int


class Residuals(NamedTuple):
    """What the backward of `fp8_product` keeps.

    Attributes:
        params: kernel and bias, which the caller holds.
        codes: the bits of the codes of x, uint8.
        x: for second derivatives, which alone read it.
        snapshot: the scales.
        amaxes: of x and of the kernel, for delayed scaling.
        remembered: the state of delayed scaling.
        recipe: as it came.
    """

    params: Parameters
    codes: jax.Array
    x: jax.Array | None
    snapshot: ScaleSnapshot
    amaxes: tuple[jax.Array, ...]
    remembered: Remembered | None
    recipe: Fp8Config


@custom_vjp(surrogate=True)
def fp8_product(
    params: Parameters, x: jax.Array, remembered: Remembered | None, recipe: Fp8Config
) -> jax.Array:
    """Computes a product of a kernel and an input in E4M3, and adds a bias.

    Args:
        params: `kernel`, float, and `bias` or no bias.
        x: inputs, float.
        remembered: the state of delayed scaling; None for current scaling.
        recipe: the product, dtypes and margin.

    Returns:
        Outputs in the dtype of the computation.
    """
    x_, kernel, bias = recipe.how.promote(x, params["kernel"], params.get("bias"))
    s = _scales(x_, kernel, remembered, recipe).scales
    wide = accumulator(x_, kernel)
    codes = [E4M3.encode(a, s[i]).astype(wide) for i, a in enumerate((x_, kernel))]
    y = recipe.of(nnx.State({"kernel": codes[1]}), codes[0]) * _both(s[0], s[1], wide)
    if bias is not None:
        y = y + jnp.reshape(bias, recipe.bias_shape).astype(wide)
    return y.astype(recipe.how.preferred_element_type or x_.dtype)


def _fwd(
    params: Parameters, x: jax.Array, remembered: Remembered | None, recipe: Fp8Config
) -> tuple[jax.Array, Residuals]:
    y = fp8_product(params, x, remembered, recipe)
    x_, kernel, _ = recipe.how.promote(x, params["kernel"], params.get("bias"))
    snapshot = _scales(x_, kernel, remembered, recipe)
    codes = lax.bitcast_convert_type(E4M3.encode(x_, snapshot.scales[0]), jnp.uint8)
    amaxes = () if remembered is None else (amax(x_), amax(kernel))
    return y, Residuals(
        params, codes, kept.keep_for_second_order(x), snapshot, amaxes, remembered, recipe
    )


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, recipe = res.params, res.recipe
    s_x, s_kernel, s_g = res.snapshot.scales
    if res.remembered is None:
        s_g = lax.stop_gradient(scale_of(amax(g), E5M2.max, 1, recipe.margin))
    else:
        record_amax(res.remembered, res.snapshot, jnp.stack([*res.amaxes, amax(g)]))
    x, kernel, _ = recipe.how.promote(res.x, params["kernel"], params.get("bias"))
    wide = accumulator(g, kernel)
    codes = lax.bitcast_convert_type(res.codes, E4M3.dtype)
    q_x = _standing_for(codes, x, s_x, wide)
    q_kernel = _standing_for(E4M3.encode(kernel, s_kernel), kernel, s_kernel, wide)
    q_g = _standing_for(E5M2.encode(g, s_g), g, s_g, wide)
    # The scales of a device belong to its part of a sum, so the sum comes after them.
    q_x, q_kernel = varying_like(q_x, q_g), varying_like(q_kernel, q_g)
    _, pull = jax.vjp(recipe.of, nnx.State({"kernel": q_kernel}), q_x)
    dparams, dx = pull(q_g)
    grads = {"kernel": dparams["kernel"] * _both(s_x, s_g, wide)}
    if "bias" in params:
        grads["bias"] = jnp.reshape(sum_to_shape(g, recipe.bias_shape), params["bias"].shape)
    return nnx.State(grads), dx * _both(s_kernel, s_g, wide), None, None


fp8_product.defvjp(_fwd, _bwd)


def _scales(
    x: jax.Array, kernel: jax.Array, remembered: Remembered | None, recipe: Fp8Config
) -> ScaleSnapshot:
    """The scales of x and of the kernel, and that of g where it is known already."""
    if remembered is not None:
        return read_scales(remembered, recipe.margin)
    asked_for = [scale_of(amax(a), E4M3.max, 1, recipe.margin) for a in (x, kernel)]
    return ScaleSnapshot(
        lax.stop_gradient(jnp.stack([*asked_for, jnp.ones_like(asked_for[0])])), None
    )


def _both(a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    """The product of two scales, which a sum of codes that is 0 may be multiplied with."""
    return jnp.minimum(a.astype(wide) * b.astype(wide), jnp.finfo(wide).max)


def _standing_for(codes: jax.Array, a: jax.Array | None, scale: jax.Array, wide: Any) -> jax.Array:
    """Codes in a wide dtype, with the derivative of what was encoded."""
    values = codes.astype(wide)
    return (
        values
        if a is None
        else kept.with_derivative_of(values, a.astype(wide) / scale.astype(wide))
    )
