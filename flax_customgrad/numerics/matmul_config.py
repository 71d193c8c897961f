"""How layers with kernels compute: dtypes and precision forward, float32 sums backward.

A forward in half precision follows flax.nnx to the bit. A backward multiplies in the same compute
dtype but sums the gradients of parameters in float32 (float64 for float64), and they stay in that
dtype: the contract casts them once, to the dtype of the parameter. Autodiff rounds a weight's
gradient to the compute dtype, https://github.com/jax-ml/jax/issues/34330, and sums a bias's in it.

Under vmap with shared parameters JAX asks a custom gradient for that of each example and then sums,
so a batch of weight gradients exists for a moment. Leading axes of the input cost no such array.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax.nnx.nn import dtypes


@dataclass(frozen=True)
class MatmulConfig:
    """The choices of a layer that are not arrays.

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

    def promote(self, *arrays: jax.Array | None) -> tuple[Any, ...]:
        """The arrays in the dtype of the computation, as `nnx` promotes them; None stays None."""
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
