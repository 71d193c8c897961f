"""XLA's own convolution and the gradients that JAX has for it: the recipe that always fits."""

import jax
from jax import lax

from flax_customgrad.layers.conv.recipes.geometry import Geometry


def correlate(x: jax.Array, w: jax.Array, geometry: Geometry, **how: object) -> jax.Array:
    """A convolution as JAX defines it.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features // groups, out_features), of the dtype of x.
        geometry: where the windows lie.
        **how: `precision`, `preferred_element_type` and `out_sharding` of JAX's convolution.

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
        **how,  # type: ignore[arg-type]
    )


def input_gradient(
    g: jax.Array, w: jax.Array, geometry: Geometry, x: jax.Array, **how: object
) -> jax.Array:
    """The gradient of `correlate` for its input, as JAX defines it.

    Args:
        g: cotangent of shape (batch, *out, out_features).
        w: the kernel, as for `correlate`.
        geometry: that of `correlate`.
        x: the input, for its type.
        **how: as for `correlate`.

    Returns:
        Array of the type of x.
    """
    return jax.linear_transpose(lambda x: correlate(x, w, geometry, **how), x)(g)[0]


def kernel_gradient(
    x: jax.Array, g: jax.Array, geometry: Geometry, w: jax.Array, **how: object
) -> jax.Array:
    """The gradient of `correlate` for its kernel, as JAX defines it.

    Args:
        x: the input, as for `correlate`.
        g: cotangent of shape (batch, *out, out_features).
        geometry: that of `correlate`.
        w: the kernel, for its type.
        **how: as for `correlate`.

    Returns:
        Array of the type of w.
    """
    return jax.linear_transpose(lambda w: correlate(x, w, geometry, **how), w)(g)[0]


def dimension_numbers(rank: int) -> lax.ConvDimensionNumbers:
    """The layout (batch, *space, features), kernels (*window, in, out).

    Args:
        rank: the number of axes of space.
    """
    array = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(array, (rank + 1, rank, *range(rank)), array)
