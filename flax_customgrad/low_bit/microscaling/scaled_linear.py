"""A linear map whose three products are of elements that share a scale in blocks.

    forward   y  = Q(x) Q(W) + b        blocks along in_features
    backward  dx = Q(g) Q(W)^T          blocks along out_features
              dW = Q(x')^T Q(g')        blocks along the rows
              db = sum g
    kept      W, and Q(x') as codes and scales: a byte or half a byte an element, and what the
              scales take. Or x, with 'original', and the gradients are the same.

A product of elements with shared scales needs blocks along the axis that is summed over, so each
operand is quantized once for each of its products, both times from the array itself. (Where the
blocks of W are squares, both products see the same values.) x' and g' are x and g as matrices of
rows, all leading axes flattened, and rotated (`hadamard`) or not.

The gradient is a surrogate: what rounds has the derivative of the identity, in second derivatives
as well. Under vmap each example has blocks of its own, under shard_map each device; on a mesh they
are those of the whole array.

The arithmetic is emulated: operands are elements times scales in float32, products are summed in
float32 (all float64 with float64) and rounded once.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import chex
import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract import residual_storage as kept
from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.microscaling.block_codes import Codes, coded, decoded
from flax_customgrad.low_bit.microscaling.hadamard import rotated
from flax_customgrad.low_bit.microscaling.scaled_blocks import Format, as_rows
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.products import MatmulConfig, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_sharding

RESIDUALS = ("quantized", "original")


@dataclass(frozen=True)
class BlockScaledConfig:
    """How the operands of the three products are quantized.

    Attributes:
        operands: the format of x and W.
        gradient: the format of g.
        squares: whether a block of W lies along both of its axes.
        rotates: whether the rows of x and g are rotated.
        residuals: what is kept of x.
    """

    operands: Format
    gradient: Format
    squares: bool = False
    rotates: bool = False
    residuals: Literal["quantized", "original"] = "quantized"

    def kernel(self, w: jax.Array, axis: int) -> jax.Array:
        """Q(W), for a product that sums over an axis."""
        return _quantized(w, self.operands, (0, 1) if self.squares else (axis,))

    def rows(self, x: jax.Array) -> jax.Array:
        """x', or g'."""
        return rotated(as_rows(x)) if self.rotates else as_rows(x)


class Residuals(NamedTuple):
    """What the backward of `scaled_linear` keeps.

    Attributes:
        params: the parameters, which the caller holds anyway.
        x: the input; where there are codes only second derivatives read it, and XLA drops it.
        codes: Q(x'), or None.
        key: what gradients are rounded with, or None.
        recipe: how operands are quantized.
        how: dtype, precision and sharding.
        of: type of x.
    """

    params: Parameters
    x: jax.Array | None
    codes: Codes | None
    key: jax.Array | None
    recipe: BlockScaledConfig
    how: MatmulConfig
    of: Any


@custom_vjp(surrogate=True)
def scaled_linear(
    params: Parameters,
    x: jax.Array,
    key: jax.Array | None,
    recipe: BlockScaledConfig,
    how: MatmulConfig,
) -> jax.Array:
    """Applies a linear map over the last axis.

    Args:
        params: `kernel` of shape (in_features, out_features), float; `bias` of shape
            (out_features,), or no bias.
        x: inputs of shape (..., in_features), float.
        key: of `jax.random`, to round gradients at random; None to round them to the nearest.
        recipe: how operands are quantized.
        how: dtype, precision and sharding.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    kernel, bias, last = params["kernel"], params.get("bias"), x.ndim - 1
    x_, w = _wide(x.dtype, x, kernel)
    y = lax.dot_general(
        _quantized(x_, recipe.operands, (last,)),
        recipe.kernel(w, 0),
        (((last,), (0,)), ((), ())),
        precision=how.precision,
        out_sharding=how.out_sharding,
    )
    if bias is not None:
        y += lax.expand_dims(bias.astype(y.dtype), range(last))
    dtype = dtypes.canonicalize_dtype(x, kernel, bias, dtype=how.dtype)
    return y.astype(how.preferred_element_type or dtype)


def _fwd(
    params: Parameters,
    x: jax.Array,
    key: jax.Array | None,
    recipe: BlockScaledConfig,
    how: MatmulConfig,
) -> tuple[jax.Array, Residuals]:
    y, codes, held = scaled_linear(params, x, key, recipe, how), None, x
    # Outside of a trace there is no XLA to drop the input.
    if recipe.residuals == "quantized" and is_traced(x):
        rows = recipe.rows(_wide(params["kernel"].dtype, x)[0])
        codes = coded(lax.stop_gradient(rows), recipe.operands)
        held = kept.keep_for_second_order(x)
    return y, Residuals(params, held, codes, key, recipe, how, jax.typeof(x))


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, recipe, p, last = res.params, res.recipe, res.how.precision, g.ndim - 1
    g_, w = _wide(res.of.dtype, g, params["kernel"])
    dx = lax.dot_general(
        _quantized(g_, recipe.gradient, (last,), _noise(res.key, 0, g_)),
        recipe.kernel(w, 1),
        (((last,), (1,)), ((), ())),
        precision=p,
        out_sharding=explicit_sharding(res.of),
    )
    rows = recipe.rows(g_)
    dkernel = parameter_gradient(
        _quantized_rows(res),
        _quantized(rows, recipe.gradient, (0,), _noise(res.key, 1, rows)),
        (((0,), (0,)), ((), ())),
        like=params["kernel"],
        precision=p,
    )
    chex.assert_equal_shape([dx, res.of])
    chex.assert_equal_shape([dkernel, params["kernel"]])
    grads = {"kernel": dkernel}
    if "bias" in params:
        grads["bias"] = total(g, range(last))
        chex.assert_equal_shape([grads["bias"], params["bias"]])
    return nnx.State(grads), dx, None, None, None


scaled_linear.defvjp(_fwd, _bwd)


def _quantized(
    x: jax.Array, by: Format, axes: tuple[int, ...], noise: jax.Array | None = None
) -> jax.Array:
    """Q(x), with the derivative of x."""
    return kept.with_derivative_of(by.rounded(lax.stop_gradient(x), axes, noise), x)


def _quantized_rows(res: Residuals) -> jax.Array:
    """Q(x'), with the derivative of x'."""
    if res.codes is not None and res.x is None:
        return decoded(res.codes, res.recipe.operands)
    assert res.x is not None
    rows = res.recipe.rows(_wide(res.params["kernel"].dtype, res.x)[0])
    if res.codes is None:
        return _quantized(rows, res.recipe.operands, (0,))
    return kept.with_derivative_of(decoded(res.codes, res.recipe.operands), rows)


def _wide(dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays in float32, or wider where a dtype or one of them is."""
    return [a.astype(accumulator(dtype, *arrays)) for a in arrays]


def _noise(key: jax.Array | None, n: int, x: jax.Array) -> jax.Array | None:
    """Uniform noise for the n-th array, or none."""
    if key is None:
        return None
    return jax.random.uniform(jax.random.fold_in(key, n), x.shape, x.dtype)
