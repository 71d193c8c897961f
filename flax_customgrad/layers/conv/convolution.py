"""Convolution: the operation behind `Conv` and `ConvTranspose`.

    forward   y[n, o, f]  = sum_{t, c} p[n, o s + t d, c] w[t, c, f] + b[f]
                            where p is x, padded and spread
    backward  dp[n, i, c] = sum_{t, o, f: o s + t d = i} g[n, o, f] w[t, c, f]
              dx          = dp without its padding, and what was repeated added up
              dW[t, c, f] = sum_{n, o} p[n, o s + t d, c] g[n, o, f]
              db[f]       = sum_{n, o} g[n, o, f]
    kept      x without its padding, and the parameters, as they came

dp is a convolution of g with the mirrored kernel. Each of the three is computed by what `lowering`
chooses for its shape. On a CPU half precision is summed in float32 and rounded once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.conv import lowering
from flax_customgrad.layers.conv.padding import BoundaryPadding
from flax_customgrad.layers.conv.recipes.geometry import Geometry, mirrored
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.products import MatmulConfig


@dataclass(frozen=True)
class ConvConfig:
    """The choices of a layer that are not arrays.

    Attributes:
        geometry: where the windows lie, on the image with what is `around` it.
        around: what is put around the image other than zeros, or None.
        mirror: whether the kernel is that of the transposed map.
        matmul: dtype, precision and sharding.
    """

    geometry: Geometry
    around: BoundaryPadding | None
    mirror: bool
    matmul: MatmulConfig


class Residuals(NamedTuple):
    """What the backward of `convolution` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    how: ConvConfig


@custom_vjp
def convolution(params: Parameters, x: jax.Array, how: ConvConfig) -> jax.Array:
    """Convolves images.

    Args:
        params: `kernel` of shape (*window, in_features // groups, out_features), or mirrored
            (*window, out_features, in_features), float; `bias` of shape (out_features,), or none.
        x: images of shape (batch, *size, in_features), float.
        how: the choices that are not arrays.

    Returns:
        Images of shape (batch, *out, out_features), in the dtype of the computation.
    """
    matmul = how.matmul
    x, kernel, bias = matmul.promote(x, params["kernel"], params.get("bias"))
    y = lowering.correlate(
        _surrounded(x, how),
        _mirrored(kernel, how),
        how.geometry,
        matmul.preferred_element_type,
        matmul.precision,
        matmul.out_sharding,
    )
    return y if bias is None else y + lax.expand_dims(bias, range(y.ndim - 1))


def _fwd(params: Parameters, x: jax.Array, how: ConvConfig) -> tuple[jax.Array, Residuals]:
    return convolution(params, x, how), Residuals(params, x, how)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params, how = res.params, res.how
    x, kernel = how.matmul.promote(res.x, params["kernel"])
    dx, dkernel = lowering.gradients(
        _surrounded(x, how), _mirrored(kernel, how), g, how.geometry, how.matmul.precision
    )
    if how.around is not None:
        dx = how.around.transpose(dx, x)
    dkernel = _mirrored(dkernel, how)
    chex.assert_equal_shape([dx, res.x])
    chex.assert_equal_shape([dkernel, kernel])
    grads = {"kernel": dkernel}
    if "bias" in params:
        grads["bias"] = total(g, range(g.ndim - 1))
        chex.assert_equal_shape([grads["bias"], params["bias"]])
    return nnx.State(grads), dx.astype(res.x.dtype), None


convolution.defvjp(_fwd, _bwd)


def _surrounded(x: jax.Array, how: ConvConfig) -> jax.Array:
    return x if how.around is None else how.around.of(x)


def _mirrored(kernel: jax.Array, how: ConvConfig) -> jax.Array:
    return mirrored(kernel, how.geometry.groups) if how.mirror else kernel
