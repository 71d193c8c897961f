"""Convolution: the operation behind `Conv` and `ConvTranspose`.

    forward   y[n, o, f]       = sum_{t, c} p[n, o s + t d, c] kernel[t, c, f] + bias[f]
                                 where p is x, padded and dilated
    backward  dp[n, i, c]      = sum_{t, o, f: o s + t d = i} g[n, o, f] kernel[t, c, f]
              dx               = dp without its padding; what a boundary repeated is added up
              dkernel[t, c, f] = sum_{n, o} p[n, o s + t d, c] g[n, o, f]
              dbias[f]         = sum_{n, o} g[n, o, f]
    kept      x without its padding, and the parameters, as they came

By the chain rule: output o reads input i = o s + t d through the tap t of the kernel, so

    dp[n, i, c]      = sum_{o, f} g[n, o, f] ∂y[n, o, f]/∂p[n, i, c]
                     = sum_{t, o, f: o s + t d = i} g[n, o, f] kernel[t, c, f]
    dkernel[t, c, f] = sum_{n, o} g[n, o, f] ∂y[n, o, f]/∂kernel[t, c, f]
                     = sum_{n, o} g[n, o, f] p[n, o s + t d, c]

with strides `s` and kernel dilation `d`. `dp` is a convolution of g with the mirrored kernel, so
that each of the three is one of the two maps of `geometry`. `choose_lowering` says what computes
them for a shape. On a CPU half precision is summed in float32 and rounded once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.conv.choose_lowering import correlate, correlate_gradients
from flax_customgrad.layers.conv.geometry import (
    BoundaryPadding,
    Geometry,
    mirror_kernel,
    with_batch_axes,
    with_one_batch_axis,
)
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.broadcasting import plus_bias
from flax_customgrad.numerics.products import MatmulConfig


@dataclass(frozen=True)
class ConvConfig:
    """The choices of a layer that are not arrays.

    Attributes:
        geometry: where the windows lie, on the image with its `boundary`.
        boundary: what is put around the image other than zeros, or None.
        transpose_kernel: whether the kernel is that of the transposed map.
        matmul: dtype, precision and sharding.
    """

    geometry: Geometry
    boundary: BoundaryPadding | None
    transpose_kernel: bool
    matmul: MatmulConfig


class Residuals(NamedTuple):
    """What the backward of `convolution` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    config: ConvConfig


@custom_vjp(leading_axes=True)
def convolution(params: Parameters, x: jax.Array, config: ConvConfig) -> jax.Array:
    """Convolves images.

    Args:
        params: `kernel` of shape (*window, in_features // groups, out_features), or for
            `transpose_kernel` (*window, out_features, in_features), float; `bias` of shape
            (out_features,), or none.
        x: images of shape (*batch, *size, in_features), float, with any number of batch axes.
        config: the choices that are not arrays.

    Returns:
        Images of shape (*batch, *out, out_features), in the dtype of the computation.
    """
    matmul = config.matmul
    x, batch = with_one_batch_axis(x, len(config.geometry.window))
    x, kernel, bias = matmul.promote(x, params["kernel"], params.get("bias"))
    y = correlate(
        _with_boundary(x, config),
        _oriented(kernel, config),
        config.geometry,
        matmul.preferred_element_type,
        matmul.precision,
        matmul.out_sharding,
    )
    return with_batch_axes(plus_bias(y, bias), batch)


def _fwd(params: Parameters, x: jax.Array, config: ConvConfig) -> tuple[jax.Array, Residuals]:
    return convolution(params, x, config), Residuals(params, x, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params, config, geometry = res.params, res.config, res.config.geometry
    (x, _), (g, _) = (with_one_batch_axis(a, len(geometry.window)) for a in (res.x, g))
    x, kernel = config.matmul.promote(x, params["kernel"])
    dims = chex.Dimensions(C=geometry.in_features, F=geometry.out_features)
    p = _with_boundary(x, config)  # `correlate` pads it with zeros and dilates it
    chex.assert_shape(
        [p, g],
        [(x.shape[0], *geometry.size, *dims["C"]), (x.shape[0], *geometry.out, *dims["F"])],
    )
    dx, dkernel = correlate_gradients(
        p, _oriented(kernel, config), g, geometry, config.matmul.precision
    )
    if config.boundary is not None:
        dx = config.boundary.transpose(dx, x)
    dkernel = _oriented(dkernel, config)
    chex.assert_shape([dx, dkernel], [x.shape, kernel.shape])
    grads = {"kernel": dkernel}
    if "bias" in params:
        dbias = grads["bias"] = total(g, range(g.ndim - 1))
        chex.assert_shape([dbias, params["bias"]], dims["F"])
    return nnx.State(grads), dx.astype(res.x.dtype).reshape(res.x.shape), None


convolution.defvjp(_fwd, _bwd)


def _with_boundary(x: jax.Array, config: ConvConfig) -> jax.Array:
    return x if config.boundary is None else config.boundary.apply(x)


def _oriented(kernel: jax.Array, config: ConvConfig) -> jax.Array:
    """The kernel of the map itself; and of its gradient, that of the parameter."""
    if not config.transpose_kernel:
        return kernel
    return mirror_kernel(kernel, config.geometry.groups)
