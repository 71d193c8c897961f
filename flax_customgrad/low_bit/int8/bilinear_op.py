"""`BilinearOp`: a product of an input and a kernel, of floats or of their int8 codes.

    y = (q_x . q_w) s_x s_w + b

The codes q and scales s of an `Int8Array`; the sums of their products are scaled once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.int8_codes import Int8Array
from flax_customgrad.numerics.broadcasting import plus_bias
from flax_customgrad.numerics.products import MatmulConfig


class ProductOfCodes(Protocol):
    """A product of the codes of an input and of a kernel."""

    @property
    def matmul(self) -> MatmulConfig:
        """dtype, precision and sharding."""
        ...

    def row_axes(self, ndim: int) -> Sequence[int]:
        """The axes of a row, of an input or an output with so many axes."""
        ...

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """The product, x . w."""
        ...


class BilinearOp(ProductOfCodes, Protocol):
    """A product of an input and a kernel, linear in each: of floats, and of codes.

    The methods take codes of the input x, of the kernel w and of the output's cotangent g, and
    return sums of products, exact where `wide` holds them. Each takes all three that there are, if
    only for their shapes.
    """

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The product of floats, and a bias; with its own gradient."""
        ...

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The transpose for x: g .^T w."""
        ...

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The transpose for w: x .^T g."""
        ...


def product_of_codes(
    op: ProductOfCodes, x: Int8Array, w: Int8Array, b: jax.Array | None, dtype: Any
) -> jax.Array:
    """Multiplies codes, scales the sums and adds a bias.

    Args:
        op: the product.
        x: the input, with a scale for each row or one for all.
        w: the kernel, with a scale for each output channel or one for all.
        b: the bias, float of shape (out_features,), or None.
        dtype: dtype of the computation.

    Returns:
        The output of the product, in the preferred dtype of `op`, or else in `dtype`.
    """
    y = op.output(x.codes, w.codes, x.scale.dtype) * by_channel(w.scale) * x.scale
    dtype = op.matmul.preferred_element_type or dtype
    if b is None:
        return y.astype(dtype)
    return plus_bias(y, b).astype(jnp.result_type(dtype, b))


def by_channel(scale: jax.Array) -> jax.Array:
    """A scale along the last axis, or of everything, as it broadcasts to any array."""
    return lax.squeeze(scale, range(scale.ndim - 1))
