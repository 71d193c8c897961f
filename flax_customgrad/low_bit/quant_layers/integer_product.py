"""Integer products: which quantized operands are multiplied as integers, and as which.

    y = (q_x . q_w) s_x s_w + b        of x_q = q_x s_x and W_q = q_w s_w

The integers are multiplied in int8, summed in int32, exactly, and scaled once. A product of floats
rounds x_q and W_q and each sum. The gradient is that of the product of floats.

Operands have at most 8 bits, no zero point, and a step for the whole array, for each row of the
input or for each output channel of the kernel; the computation is in float32 or half precision.

Whether integers are multiplied is known before any value is: it hangs on schemes, shapes, dtypes
and the platform. So a packed model multiplies as the model that it is made of, to the same bits.

They are multiplied where that gains: on a CPU, for kernels of 2^15 weights or more. XLA of jax 0.12
is 2 to 4 times as fast with int8 as with float32 where there is AVX-512 VNNI, and 1.1 to 2.5 times
with AVX2. That of jax before 0.12 only reads a kernel of a quarter of the bytes, and gains with up
to 8 rows. Other platforms have not been measured, and multiply floats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.bilinear_op import ProductOfCodes, product_of_codes
from flax_customgrad.low_bit.int8.int8_codes import Int8Array
from flax_customgrad.low_bit.quant_layers.packed_kernel import PackedKernel
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.packing import unpack_places
from flax_customgrad.numerics.products import MatmulConfig
from flax_customgrad.numerics.sizes import is_known

_LARGEST_SUM = 2**31 - 1
_LEAST_WEIGHTS = 2**15
"""Of fewer, a product takes a tenth of a millisecond, and what is done for it as long."""
_MOST_ROWS = None if jax.__version_info__ >= (0, 12) else 8
"""How many rows of integers a CPU multiplies no more slowly than floats; None for any number."""


class IntegerProduct(NamedTuple):
    """A product of integers.

    Attributes:
        x: the input, with a step for each row or one for all.
        kernel: the kernel, with a step for each output channel or one for all.
        op: the product of their codes.
    """

    x: Int8Array
    kernel: Int8Array
    op: ProductOfCodes

    def __call__(self, params: Parameters, x: jax.Array, kernel: str) -> jax.Array:
        """The scaled product, plus a bias, like that of the floats.

        Args:
            params: the quantized kernel, of which the dtype is read, and `bias`, or none.
            x: the quantized input, of which the dtype is read.
            kernel: the name of the kernel.
        """
        x, _, bias = self.op.matmul.promote(x, params[kernel], params.get("bias"))
        return product_of_codes(self.op, self.x, self.kernel, bias, x.dtype)


def integer_product(
    op: ProductOfCodes | None, x: Any, kernel: Any, x_in: jax.Array, kernel_in: jax.Array
) -> IntegerProduct | None:
    """The product of a layer's operands as integers; None where floats are multiplied.

    Args:
        op: the product of codes; None for a layer that has none.
        x: the input, as `Codes`, or an array that is not quantized.
        kernel: the kernel likewise, or a `PackedKernel`.
        x_in: what x was before it was quantized.
        kernel_in: what the kernel was before it was quantized; the values of a packed one.
    """
    if op is None or not isinstance(x, Codes) or not isinstance(kernel, Codes | PackedKernel):
        return None
    is_packed = isinstance(kernel, PackedKernel)
    of_x = _step(x.scheme, x.parameters)
    of_kernel = _step(kernel.scheme, kernel.scheme_parameters if is_packed else kernel.parameters)
    shape = kernel_in.shape
    row, all_but_last = op.row_axes(x_in.ndim), range(len(shape) - 1)
    if (
        of_x is None
        or of_kernel is None
        or not _is_shared_along(of_x, row, x_in.ndim)
        or not _is_shared_along(of_kernel, all_but_last, len(shape))
        or jnp.float64 in (x_in.dtype, kernel_in.dtype, op.matmul.dtype)
        or not _has_int32_sums(x.scheme, kernel.scheme, math.prod(shape[:-1]))
        or not _gains(x_in.shape[:-1], kernel_in.size)
    ):
        return None
    of_x = _nan_where_not_finite(of_x, x_in, row)
    if not is_packed:
        of_kernel = _nan_where_not_finite(of_kernel, kernel_in, all_but_last)
        codes = kernel.integers()
    else:
        codes = kernel.codes[...]
        if codes.dtype != jnp.int8:
            op = OfPacked(op, kernel.bits, kernel.scheme.low, shape[-1])
    return IntegerProduct(
        Int8Array(x.integers(), of_x, None), Int8Array(codes, of_kernel, None), op
    )


@dataclass(frozen=True)
class OfPacked:
    """A product with a kernel whose codes are packed along the output channels.

    The codes in the same place of each byte are multiplied together, and the channels are put in
    order afterwards: to put the codes in order takes XLA on a CPU longer than to multiply them.

    Attributes:
        op: the product with a kernel of int8.
        bits: how many bits a code takes.
        low: the integer of the code 0.
        channels: how many output channels there are.
    """

    op: ProductOfCodes
    bits: int
    low: int
    channels: int

    @property
    def matmul(self) -> MatmulConfig:
        """dtype, precision and sharding."""
        return self.op.matmul

    def row_axes(self, ndim: int) -> Sequence[int]:
        """The axes of a row."""
        return self.op.row_axes(ndim)

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """The product, x . w."""
        places = (q.astype(jnp.int8) + jnp.int8(self.low) for q in unpack_places(w, self.bits))
        y = jnp.stack([self.op.output(x, q, wide) for q in places], -1)
        return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])[..., : self.channels]


def _step(scheme: Scheme, parameters: tuple[jax.Array, ...]) -> jax.Array | None:
    """The step of integers in int8, float32; None where they are others, or have a zero point."""
    parameters = tuple(widened(jnp.float32, *parameters))
    zero = scheme.zero_point(*parameters)
    # A zero point that is an array is one that is measured.
    has_none = isinstance(zero, int) and zero == 0
    return scheme.step(*parameters) if has_none and scheme.is_int8 else None


def _is_shared_along(step: jax.Array, axes: Sequence[int], ndim: int) -> bool:
    shape = (1,) * (ndim - step.ndim) + step.shape
    return all(shape[axis] == 1 for axis in axes)


def _has_int32_sums(x: Scheme, kernel: Scheme, terms: int) -> bool:
    largest = (max(-scheme.low, scheme.high) for scheme in (x, kernel))
    return terms * math.prod(largest) <= _LARGEST_SUM


def _gains(rows: Sequence[int], weights: int) -> bool:
    """Whether integers are multiplied at least as fast as floats."""
    if jax.default_backend() != "cpu" or weights < _LEAST_WEIGHTS:
        return False
    if _MOST_ROWS is None:
        return True
    # A vector alone may be one of many, to `jax.vmap`.
    return bool(rows) and all(map(is_known, rows)) and math.prod(rows) <= _MOST_ROWS


def _nan_where_not_finite(step: jax.Array, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The step, NaN for a row or channel with an element that has no integer."""
    return jnp.where(jnp.isfinite(x).all(tuple(axes), keepdims=True), step, jnp.nan)
