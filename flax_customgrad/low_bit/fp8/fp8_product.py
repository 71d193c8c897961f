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
from flax_customgrad.low_bit.fp8.delayed_scaling import Remembered, Turn, remember, turn
from flax_customgrad.low_bit.fp8.fp8_formats import E4M3, E5M2, amax, scale_of
from flax_customgrad.low_bit.quant_layers.quantized_product import Map
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.arithmetic import Arithmetic
from flax_customgrad.numerics.arrays import summed_to


@dataclass(frozen=True)
class Recipe:
    """The choices that are not arrays.

    Attributes:
        of: the product, linear in kernel and input.
        bias_shape: the shape of the bias that broadcasts to y.
        how: dtypes; precision and sharding are in `of`.
        margin: how many halvings of a range are left unused.
    """

    of: Map
    bias_shape: tuple[int, ...]
    how: Arithmetic
    margin: int


class Residuals(NamedTuple):
    """What the backward of `fp8_product` keeps.

    Attributes:
        params: kernel and bias, which the caller holds.
        codes: the bits of the codes of x, uint8.
        x: for second derivatives, which alone read it.
        turn: the scales.
        amaxes: of x and of the kernel, for delayed scaling.
        remembered: the state of delayed scaling.
        recipe: as it came.
    """

    params: Parameters
    codes: jax.Array
    x: jax.Array | None
    turn: Turn
    amaxes: tuple[jax.Array, ...]
    remembered: Remembered | None
    recipe: Recipe


@custom_vjp(surrogate=True)
def fp8_product(
    params: Parameters, x: jax.Array, remembered: Remembered | None, recipe: Recipe
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
    s = _turn(x_, kernel, remembered, recipe).scales
    wide = accumulator(x_, kernel)
    codes = [E4M3.encode(a, s[i]).astype(wide) for i, a in enumerate((x_, kernel))]
    y = recipe.of(nnx.State({"kernel": codes[1]}), codes[0]) * _both(s[0], s[1], wide)
    if bias is not None:
        y = y + jnp.reshape(bias, recipe.bias_shape).astype(wide)
    return y.astype(recipe.how.preferred_element_type or x_.dtype)


def _fwd(
    params: Parameters, x: jax.Array, remembered: Remembered | None, recipe: Recipe
) -> tuple[jax.Array, Residuals]:
    y = fp8_product(params, x, remembered, recipe)
    x_, kernel, _ = recipe.how.promote(x, params["kernel"], params.get("bias"))
    turn = _turn(x_, kernel, remembered, recipe)
    codes = lax.bitcast_convert_type(E4M3.encode(x_, turn.scales[0]), jnp.uint8)
    amaxes = () if remembered is None else (amax(x_), amax(kernel))
    return y, Residuals(params, codes, kept.beside(x), turn, amaxes, remembered, recipe)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, recipe = res.params, res.recipe
    s_x, s_kernel, s_g = res.turn.scales
    if res.remembered is None:
        s_g = lax.stop_gradient(scale_of(amax(g), E5M2.max, 1, recipe.margin))
    else:
        remember(res.remembered, res.turn, jnp.stack([*res.amaxes, amax(g)]))
    x, kernel, _ = recipe.how.promote(res.x, params["kernel"], params.get("bias"))
    wide = accumulator(g, kernel)
    codes = lax.bitcast_convert_type(res.codes, E4M3.dtype)
    q_x = _standing_for(codes, x, s_x, wide)
    q_kernel = _standing_for(E4M3.encode(kernel, s_kernel), kernel, s_kernel, wide)
    q_g = _standing_for(E5M2.encode(g, s_g), g, s_g, wide)
    # The scales of a device belong to its part of a sum, so the sum comes after them.
    q_x, q_kernel = _varying(q_x, q_g), _varying(q_kernel, q_g)
    _, pull = jax.vjp(recipe.of, nnx.State({"kernel": q_kernel}), q_x)
    dparams, dx = pull(q_g)
    grads = {"kernel": dparams["kernel"] * _both(s_x, s_g, wide)}
    if "bias" in params:
        grads["bias"] = jnp.reshape(summed_to(g, recipe.bias_shape), params["bias"].shape)
    return nnx.State(grads), dx * _both(s_kernel, s_g, wide), None, None


fp8_product.defvjp(_fwd, _bwd)


def _turn(x: jax.Array, kernel: jax.Array, remembered: Remembered | None, recipe: Recipe) -> Turn:
    """The scales of x and of the kernel, and that of g where it is known already."""
    if remembered is not None:
        return turn(remembered, recipe.margin)
    asked_for = [scale_of(amax(a), E4M3.max, 1, recipe.margin) for a in (x, kernel)]
    return Turn(lax.stop_gradient(jnp.stack([*asked_for, jnp.ones_like(asked_for[0])])), None)


def _both(a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    """The product of two scales, which a sum of codes that is 0 may be multiplied with."""
    return jnp.minimum(a.astype(wide) * b.astype(wide), jnp.finfo(wide).max)


def _standing_for(codes: jax.Array, a: jax.Array | None, scale: jax.Array, wide: Any) -> jax.Array:
    """Codes in a wide dtype, with the derivative of what was encoded."""
    values = codes.astype(wide)
    return values if a is None else kept.standing_for(values, a.astype(wide) / scale.astype(wide))


def _varying(a: jax.Array, like: jax.Array) -> jax.Array:
    """An array that varies over the devices of a shard_map wherever another does."""
    missing = _axes(like) - _axes(a)
    return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a


def _axes(a: jax.Array) -> frozenset[Any]:
    return jax.typeof(a).manual_axis_type.varying
