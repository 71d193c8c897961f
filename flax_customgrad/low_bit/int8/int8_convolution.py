"""`ConvolutionOp`: images convolved with a kernel, of floats or of int8 codes."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.layers.conv.choose_lowering import correlate, correlate_gradients
from flax_customgrad.layers.conv.convolution import ConvConfig, convolution
from flax_customgrad.layers.conv.geometry import Geometry, mirror_kernel
from flax_customgrad.layers.conv.lowerings.xla_convolution import xla_correlate
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.int8_codes import is_exact_in_float, sum_products
from flax_customgrad.numerics.products import MatmulConfig

# XLA's convolution of fewer int8 features is slower than that of floats.
_FEW_FEATURES = 4


@dataclass(frozen=True)
class ConvolutionOp:
    """Images convolved with a kernel, a `BilinearOp`.

    Attributes:
        config: where the windows lie, and dtype, precision and sharding.
    """

    config: ConvConfig

    @property
    def matmul(self) -> MatmulConfig:
        """dtype, precision and sharding."""
        return self.config.matmul

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The convolution of floats."""
        return convolution(params, x, self.config)

    def row_axes(self, ndim: int) -> range:
        """All axes but the first."""
        return range(1, ndim)

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """The convolution."""
        return _correlate(self._surrounded(x), w, self.config.geometry, wide, self.config.matmul)

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The convolution of g with the mirrored kernel."""
        geometry = self.config.geometry
        w = mirror_kernel(w, geometry.groups)
        matmul = replace(self.config.matmul, out_sharding=None)
        dx = _correlate(g, w, geometry.transposed, wide, matmul)
        boundary = self.config.boundary
        return dx if boundary is None else boundary.transpose(dx, x.astype(wide))

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The sums over images and places, in float: XLA has no fast convolution of int8 for it."""
        x, w, g = (a.astype(wide) for a in (self._surrounded(x), w, g))
        return correlate_gradients(x, w, g, self.config.geometry, self.config.matmul.precision)[1]

    def _surrounded(self, x: jax.Array) -> jax.Array:
        return x if self.config.boundary is None else self.config.boundary.apply(x)


def _correlate(
    x: jax.Array, w: jax.Array, geometry: Geometry, wide: Any, matmul: MatmulConfig
) -> jax.Array:
    """A convolution of codes: in int8 where all of several features meet, else in float."""

    def multiply(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
        if dtype == jnp.int32:
            return xla_correlate(
                x, w, geometry, preferred_element_type=dtype, out_sharding=matmul.out_sharding
            )
        return correlate(x, w, geometry, dtype, matmul.precision, matmul.out_sharding)

    terms = _places_met(geometry) * geometry.in_features // geometry.groups
    has_many_terms = geometry.is_dense and geometry.in_features >= _FEW_FEATURES
    if is_exact_in_float(terms, wide) and not has_many_terms:
        return multiply(wide, x.astype(wide), w.astype(wide))
    # XLA has few convolutions of int8 on a GPU, https://github.com/jax-ml/jax/issues/7637.
    return sum_products(multiply, x, w, terms=terms, wide=wide, in_float_on=("cuda", "rocm"))


def _places_met(geometry: Geometry) -> int:
    """How many places of the input a window meets, and not the zeros that spread it out."""
    axes = zip(geometry.window, geometry.kernel_dilation, geometry.input_dilation, strict=True)
    return math.prod(-(-n // (spread // math.gcd(spread, step))) for n, step, spread in axes)
