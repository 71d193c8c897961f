"""`MatmulOp`: rows times a kernel, of floats or of int8 codes."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.linear.linear import linear
from flax_customgrad.low_bit.int8.int8_codes import sum_products
from flax_customgrad.numerics import products
from flax_customgrad.numerics.products import MatmulConfig
from flax_customgrad.numerics.sizes import is_known


@dataclass(frozen=True)
class MatmulOp:
    """Rows times a kernel, a `BilinearOp`.

    Attributes:
        matmul: dtype, precision and sharding.
    """

    matmul: MatmulConfig

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """`x w + b`, in float."""
        return linear(params, x, self.matmul)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The last axis."""
        return (ndim - 1,)

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """`y[..., o] = sum_i x[..., i] w[i, o]`."""
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        sharding = self.matmul.out_sharding
        if sharding is None and _is_one_row(x):
            padding = [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]
            return self.output(jnp.pad(x, padding), w, wide)[..., :1, :]

        def multiply(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
            return lax.dot_general(
                x, w, numbers, preferred_element_type=dtype, out_sharding=sharding
            )

        return sum_products(multiply, x, w, terms=w.shape[0], wide=wide)

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """`dx[..., i] = sum_o g[..., o] w[i, o]`."""
        numbers = (((g.ndim - 1,), (1,)), ((), ()))

        def multiply(dtype: Any, g: jax.Array, w: jax.Array) -> jax.Array:
            return products.product(g, w, numbers, dtype, like=x)

        return sum_products(multiply, g, w, terms=w.shape[1], wide=wide)

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """`dw[i, o] = sum_... x[..., i] g[..., o]`."""
        rows = tuple(range(g.ndim - 1))

        def multiply(dtype: Any, x: jax.Array, g: jax.Array) -> jax.Array:
            return products.product(x, g, ((rows, rows), ((), ())), dtype, like=w)

        # XLA on a CPU takes 2 to 6 times as long for int8 whose first axes meet.
        terms = math.prod(g.shape[:-1])
        return sum_products(multiply, x, g, terms=terms, wide=wide, in_float_on=("cpu",))


def _is_one_row(x: jax.Array) -> bool:
    """Whether codes are a single row, which XLA on a CPU multiplies 3 to 5 times as slowly as two.

    A vector, without an axis of rows, is left alone: `jax.vmap` may give it one.
    """
    rows = x.shape[:-1]
    is_one = x.ndim > 1 and all(map(is_known, rows)) and math.prod(rows) == 1
    return is_one and jax.default_backend() == "cpu"
