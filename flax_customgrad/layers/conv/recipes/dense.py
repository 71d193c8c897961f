"""Dense: one convolution over all features, in the one layout that XLA is fast in everywhere.

    y[n, o, f]  = sum_{t, c} x[n, o s + t d - low, c] w[t, c, f]
    dW[t, c, f] = sum_{n, o} x[n, o s + t d - low, c] g[n, o, f]

dW is again a convolution: c is its batch, n its feature, g its kernel, strides and dilation have
changed places. XLA on a CPU has a fast convolution for (batch, *space, features) alone. It brings
others into that layout, but not within a loop: there JAX's own dW runs 100 to 200 times slower
(6 s instead of 45 ms for 128 features of 16 images of 32 x 32), in every `lax.scan` over layers.
So dW is written in that layout here.
"""

import einops
import jax
from jax import lax

from flax_customgrad.layers.conv.recipes import xla_convolution as xla
from flax_customgrad.layers.conv.recipes.geometry import Geometry


def fits(geometry: Geometry) -> bool:
    """Whether there is one group, and the input is not spread out.

    Args:
        geometry: any.
    """
    return geometry.groups == 1 and all(d == 1 for d in geometry.input_dilation)


def correlate(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's convolution.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features, out_features).
        geometry: where the windows lie, in one group.
    """
    return xla.correlate(x, w, geometry)


def kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient of the kernel as a convolution of x by g.

    Args:
        x: array of shape (batch, *size, in_features).
        g: array of shape (batch, *out, out_features).
        geometry: that of `correlate`.

    Returns:
        Array of shape (*window, in_features, out_features).
    """
    dw = lax.conv_general_dilated(
        einops.rearrange(x, "n ... c -> c ... n"),
        einops.rearrange(g, "n ... f -> ... n f"),
        window_strides=geometry.kernel_dilation,
        padding=geometry.padding_to(geometry.seen(geometry.out)),
        rhs_dilation=geometry.strides,
        dimension_numbers=xla.dimension_numbers(geometry.rank),
    )
    return einops.rearrange(dw, "c ... f -> ... c f")
