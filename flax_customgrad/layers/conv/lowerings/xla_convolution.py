"""XLA's own convolution and the gradients that JAX has for it: the lowering that always fits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry
from flax_customgrad.layers.conv.lowerings.lowering import Lowering


class XlaLowering(Lowering):
    """XLA's convolution, and JAX's gradient of its kernel."""

    def fits(self, geometry: Geometry) -> bool:
        """Always."""
        return True

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """XLA's convolution."""
        return xla_correlate(x, w, geometry)

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """JAX's gradient of XLA's convolution for its kernel."""
        shape = (*geometry.window, geometry.in_features // geometry.groups, geometry.out_features)
        return xla_kernel_gradient(x, g, geometry, jnp.zeros_like(x, shape=shape))


def xla_correlate(x: jax.Array, w: jax.Array, geometry: Geometry, **kwargs: Any) -> jax.Array:
    """A convolution as JAX defines it.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features // groups, out_features), of the dtype of x.
        geometry: where the windows lie.
        **kwargs: `precision`, `preferred_element_type` and `out_sharding` of JAX's convolution.

    Returns:
        Array of shape (batch, *out, out_features).
    """
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.padding,
        geometry.input_dilation,
        geometry.kernel_dilation,
        dimension_numbers(geometry.rank),
        geometry.groups,
        **kwargs,
    )


def xla_input_gradient(
    g: jax.Array, w: jax.Array, geometry: Geometry, x: jax.Array, **kwargs: Any
) -> jax.Array:
    """The gradient of `xla_correlate` for its input, as JAX defines it.

    Args:
        g: cotangent of shape (batch, *out, out_features).
        w: the kernel, as for `xla_correlate`.
        geometry: that of `xla_correlate`.
        x: the input, for its type.
        **kwargs: as for `xla_correlate`.

    Returns:
        Array of the type of x.
    """
    return jax.linear_transpose(lambda x: xla_correlate(x, w, geometry, **kwargs), x)(g)[0]


def xla_kernel_gradient(
    x: jax.Array, g: jax.Array, geometry: Geometry, w: jax.Array, **kwargs: Any
) -> jax.Array:
    """The gradient of `xla_correlate` for its kernel, as JAX defines it.

    Args:
        x: the input, as for `xla_correlate`.
        g: cotangent of shape (batch, *out, out_features).
        geometry: that of `xla_correlate`.
        w: the kernel, for its type.
        **kwargs: as for `xla_correlate`.

    Returns:
        Array of the type of w.
    """
    return jax.linear_transpose(lambda w: xla_correlate(x, w, geometry, **kwargs), w)(g)[0]


def dimension_numbers(rank: int) -> lax.ConvDimensionNumbers:
    """The layout (batch, *space, features), kernels (*window, in, out).

    Args:
        rank: the number of axes of space.
    """
    array = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(array, (rank + 1, rank, *range(rank)), array)
