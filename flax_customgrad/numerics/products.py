"""Products of a layer with its kernel: dtypes and precision forward, float32 sums backward.

A forward in half precision follows flax.nnx to the bit. A backward multiplies in the same compute
dtype but sums the gradients of parameters in float32 (float64 for float64), and they stay in that
dtype: the contract casts them once, to the dtype of the parameter. Autodiff rounds a weight's
gradient to the compute dtype, https://github.com/jax-ml/jax/issues/34330, and sums a bias's in it.
A product of a backward is laid out and sharded like the array whose gradient it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.row_products import sum_over_rows
from flax_customgrad.numerics.sharding import explicit_sharding


@dataclass(frozen=True)
class MatmulConfig:
    """The arguments of a layer's product that are not arrays.

    Attributes:
        dtype: dtype of the computation, or None to infer it from inputs and parameters.
        precision: `jax.lax.Precision` of every product, forward and backward.
        preferred_element_type: dtype of the forward product's result, or None.
        out_sharding: sharding of the forward product's result, or None.
    """

    dtype: Any = None
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.precision, list):  # one for each operand; JAX takes a list too
            object.__setattr__(self, "precision", tuple(self.precision))

    def promote(self, *arrays: jax.Array | None) -> tuple[Any, ...]:
        """Casts arrays to the dtype of the computation, as nnx promotes them; None stays None."""
        found = {a.dtype for a in arrays if a is not None}
        if len(found) == 1 and self.dtype in (None, *found):
            return arrays
        dtype = dtypes.canonicalize_dtype(*arrays, dtype=self.dtype)
        return tuple(a if a is None or a.dtype == dtype else a.astype(dtype) for a in arrays)

    def forward_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the forward `dot_general` or `einsum`."""
        kwargs = {"precision": self.precision, "out_sharding": self.out_sharding}
        if self.preferred_element_type is not None:
            kwargs["preferred_element_type"] = self.preferred_element_type
        return kwargs


def parameter_gradient(lhs: jax.Array, rhs: jax.Array, numbers: Any, **where: Any) -> jax.Array:
    """The gradient of a kernel: a product summed over the batch.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: the axes to contract and to batch, as for `lax.dot_general`: ((lhs_contracting,
            rhs_contracting), (lhs_batch, rhs_batch)).
        **where: `like`, `order` and `precision` of `product`.

    Returns:
        An array laid out like the parameter, in the accumulator's dtype.
    """
    return product(lhs, rhs, numbers, accumulator(lhs, rhs), **where)


def input_gradient(lhs: jax.Array, rhs: jax.Array, numbers: Any, **where: Any) -> jax.Array:
    """The gradient of an input: a product summed over features.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: the axes to contract and to batch, as for `parameter_gradient`.
        **where: `like`, `order` and `precision` of `product`.

    Returns:
        An array laid out like the input. A half-precision input gets its gradient in that
        precision and costs no array of float32; a float32 input loses no digits.
    """
    # By their dtypes: a weakly typed input has a gradient of its own dtype all the same.
    dtype = jnp.result_type(lhs.dtype, rhs.dtype, where["like"].dtype)
    return product(lhs, rhs, numbers, dtype, **where)


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    numbers: Any,
    dtype: Any,
    *,
    like: jax.Array,
    order: Sequence[int] | None = None,
    precision: Any = None,
) -> jax.Array:
    """`lax.dot_general`, laid out and sharded like the array whose gradient it is.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: the axes to contract and to batch.
        dtype: dtype of the result.
        like: the array whose gradient this is.
        order: which axis of `like` each axis of the product is; None where they agree. Axes of
            `like` may be missing.
        precision: `jax.lax.Precision`.

    Returns:
        An array with the axes in the order of `like`.
    """
    out_sharding = explicit_sharding(jax.typeof(like), order)
    if _are_rows(numbers) and out_sharding is None:
        lhs_rows, rhs_rows = numbers[0]
        out = sum_over_rows(lhs, rhs, lhs_rows, rhs_rows, dtype, precision)
    else:
        out = lax.dot_general(
            lhs,
            rhs,
            numbers,
            precision=precision,
            preferred_element_type=dtype,
            out_sharding=out_sharding,
        )
    if order is None:
        return out
    return lax.transpose(out, sorted(range(out.ndim), key=order.__getitem__))


def _are_rows(numbers: Any) -> bool:
    """Whether the axes that a product contracts are the leading ones of both arrays."""
    contracting, batch = numbers
    leading = tuple(range(len(contracting[0])))
    return all(tuple(axes) == leading for axes in contracting) and not any(map(len, batch))
