"""A linear map whose three products are of elements that share a scale in blocks.

    forward   y  = Q(x) Q(w) + b          blocks along in_features
    backward  dx = R(g) Q(w)^T            blocks along out_features
              dw = Q(x')^T R(g')          blocks along the rows
              db = sum g
    kept      w, and Q(x') as codes and scales: a byte or half a byte an element, and what the
              scales take. Or x, with 'original', and the gradients are the same.

Q and R are what the elements and scales of the operands' and of the gradient's format stand for
(`BlockFormat.rounded`); R rounds to the nearest or at random. A product of elements with shared
scales needs blocks along the axis that is summed over, so each operand is quantized once for each
of its products, both times from the array itself. (Where the blocks of w are squares, both products
see the same values.) x' and g' are x and g as matrices of rows, all leading axes flattened, and
rotated or not, by a random 16-point Hadamard transform along the rows:

    x'[16 j + k] = sum_l H[k, l] s[l] x[16 j + l] / 4,   H the Hadamard matrix, s fixed signs

It is orthonormal: two operands that are both transformed have the product that they had. An
outlier is spread over 16 rows, which lowers the largest element of its block; the signs keep a
constant from becoming one. The signs are those of NVIDIA's TransformerEngine.

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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.contract.residual_storage import keep_for_second_order, with_derivative_of
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.microscaling.scaled_blocks import (
    BlockCodes,
    BlockFormat,
    as_rows,
    decode_blocks,
    encode_blocks,
    split_blocks,
)
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.products import MatmulConfig, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_sharding

RESIDUALS = ("quantized", "original")

_HADAMARD_SIZE = 16
_SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


@dataclass(frozen=True)
class BlockScaledConfig:
    """How the operands of the three products are quantized.

    Attributes:
        operands: the format of x and w.
        gradient: the format of g.
        squares: whether a block of w lies along both of its axes.
        rotates: whether the rows of x and g are rotated.
        residuals: what is kept of x.
        packed: whether w is Q(w) for the forward already.
    """

    operands: BlockFormat
    gradient: BlockFormat
    squares: bool = False
    rotates: bool = False
    residuals: Literal["quantized", "original"] = "quantized"
    packed: bool = False

    def kernel_axes(self, axis: int) -> tuple[int, ...]:
        """The axes of w along which blocks lie, for a product that sums over an axis."""
        return (0, 1) if self.squares else (axis,)

    def quantize_kernel(self, w: jax.Array, axis: int) -> jax.Array:
        """Q(w), for a product that sums over an axis."""
        if self.packed and self.kernel_axes(axis) == self.kernel_axes(0):
            return w
        return _quantize(w, self.operands, self.kernel_axes(axis))

    def rows(self, x: jax.Array) -> jax.Array:
        """x', or g'."""
        return rotate_rows(as_rows(x)) if self.rotates else as_rows(x)


class Residuals(NamedTuple):
    """What the backward of `scaled_linear` keeps.

    Attributes:
        params: the parameters, which the caller holds anyway.
        x: the input; where there are codes only second derivatives read it, and XLA drops it.
        codes: those of Q(x'), or None.
        key: what gradients are rounded with, or None.
        config: how operands are quantized.
        matmul: dtype, precision and sharding.
        x_aval: type of x.
    """

    params: Parameters
    x: jax.Array | None
    codes: BlockCodes | None
    key: jax.Array | None
    config: BlockScaledConfig
    matmul: MatmulConfig
    x_aval: Any


@custom_vjp(surrogate=True)
def scaled_linear(
    params: Parameters,
    x: jax.Array,
    key: jax.Array | None,
    config: BlockScaledConfig,
    matmul: MatmulConfig,
) -> jax.Array:
    """Applies a linear map over the last axis.

    Args:
        params: `kernel` of shape (in_features, out_features), float; `bias` of shape
            (out_features,), or no bias.
        x: inputs of shape (..., in_features), float.
        key: of `jax.random`, to round gradients at random; None to round them to the nearest.
        config: how operands are quantized.
        matmul: dtype, precision and sharding.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    kernel, bias, last = params["kernel"], params.get("bias"), x.ndim - 1
    x_, w = _widen(x.dtype, x, kernel)
    y = lax.dot_general(
        _quantize(x_, config.operands, (last,)),
        config.quantize_kernel(w, 0),
        (((last,), (0,)), ((), ())),
        precision=matmul.precision,
        out_sharding=matmul.out_sharding,
    )
    if bias is not None:
        y += lax.expand_dims(bias.astype(y.dtype), range(last))
    dtype = dtypes.canonicalize_dtype(x, kernel, bias, dtype=matmul.dtype)
    return y.astype(matmul.preferred_element_type or dtype)


def _fwd(
    params: Parameters,
    x: jax.Array,
    key: jax.Array | None,
    config: BlockScaledConfig,
    matmul: MatmulConfig,
) -> tuple[jax.Array, Residuals]:
    y, codes, held = scaled_linear(params, x, key, config, matmul), None, x
    # Outside of a trace there is no XLA to drop the input.
    if config.residuals == "quantized" and is_traced(x):
        rows = config.rows(_widen(params["kernel"].dtype, x)[0])
        codes = encode_blocks(lax.stop_gradient(rows), config.operands)
        held = keep_for_second_order(x)
    return y, Residuals(params, held, codes, key, config, matmul, jax.typeof(x))


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None, None]:
    params, config, precision = res.params, res.config, res.matmul.precision
    last = g.ndim - 1
    stored = None if res.codes is None else (res.codes.elements, res.codes.scales)
    g, (kernel, stored) = wait_for(g, (params["kernel"], stored))
    if res.codes is not None and stored is not None:
        elements, scales = stored
        res = res._replace(codes=res.codes._replace(elements=elements, scales=scales))
    dims = chex.Dimensions(I=kernel.shape[0], O=kernel.shape[1])
    batch = res.x_aval.shape[:-1]
    chex.assert_shape(g, (*batch, *dims["O"]))
    g_, w = _widen(res.x_aval.dtype, g, kernel)
    q_w, r_g = config.quantize_kernel(w, 1), _quantize(g_, config.gradient, (last,), res.key, 0)
    dx = lax.dot_general(
        r_g,
        q_w,
        (((last,), (1,)), ((), ())),
        precision=precision,
        out_sharding=explicit_sharding(res.x_aval),
    )
    q_x_rows = _quantized_rows(res)
    r_g_rows = _quantize(config.rows(g_), config.gradient, (0,), res.key, 1)
    chex.assert_equal_shape_prefix([q_x_rows, r_g_rows], 1)
    dw = parameter_gradient(
        q_x_rows, r_g_rows, (((0,), (0,)), ((), ())), like=kernel, precision=precision
    )
    chex.assert_shape([dx, dw], [(*batch, *dims["I"]), dims["IO"]])
    grads = {"kernel": dw}
    if "bias" in params:
        db = grads["bias"] = total(g, range(last))
        chex.assert_shape([db, params["bias"]], dims["O"])
    return nnx.State(grads), dx, None, None, None


scaled_linear.defvjp(_fwd, _bwd)


def rotate_rows(x: jax.Array) -> jax.Array:
    """Transforms the rows of a matrix by the random Hadamard transform.

    Args:
        x: array of shape (rows, n), float32 or float64.

    Returns:
        Array of shape (rows', n), rows' the next multiple of 16.
    """
    # Loaded where it is used: it takes longer to import than this library.
    from scipy.linalg import hadamard

    signed = jnp.asarray(hadamard(_HADAMARD_SIZE) * _SIGNS / 4, x.dtype)
    blocks = split_blocks(x, (0,), _HADAMARD_SIZE)
    rotated = jnp.einsum("kl,jln->jkn", signed, blocks, precision=lax.Precision.HIGHEST)
    return as_rows(rotated)


def _quantize(
    x: jax.Array,
    form: BlockFormat,
    axes: tuple[int, ...],
    key: jax.Array | None = None,
    n: int = 0,
) -> jax.Array:
    """Q(x), or with the n-th noise of a key R(x), with the derivative of x."""
    noise = None
    if key is not None:
        noise = jax.random.uniform(jax.random.fold_in(key, n), x.shape, x.dtype)
    return with_derivative_of(form.rounded(lax.stop_gradient(x), axes, noise), x)


def _quantized_rows(res: Residuals) -> jax.Array:
    """Q(x'), with the derivative of x'."""
    if res.codes is not None and res.x is None:
        return decode_blocks(res.codes, res.config.operands)
    assert res.x is not None
    rows = res.config.rows(_widen(res.params["kernel"].dtype, res.x)[0])
    if res.codes is None:
        return _quantize(rows, res.config.operands, (0,))
    return with_derivative_of(decode_blocks(res.codes, res.config.operands), rows)


def _widen(dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays in float32, or wider where a dtype or one of them is."""
    return [a.astype(accumulator(dtype, *arrays)) for a in arrays]
