"""`normalize`: the gradient that every normalization of activations shares.

    forward   x^ = (x - mean) r,  r = 1 / sqrt(var + epsilon)     statistics over the reduced axes
              y  = scale x^ + bias                                along the feature axes
    backward  h  = scale g
              dx = r (h - [sum(h) + x^ sum(h x^)] / n) + dmean / n + 2 dvar (x - mean) / n
              dscale = sum(g x^),  dbias = sum(g)
    kept      x and the parameters, as they came, and per statistic three numbers (`moments`);
              or, with residual="output", y in the place of x: x^ = (y - bias) / scale

n is how many elements share a statistic. With a mask, the sums run over all elements, because all
were normalized, and the bracket and the last two terms apply where the mask is True. Without a mean
(RMSNorm) the bracket is x^ sum(h x^) alone. Where there is nothing to divide by (all is masked, or
epsilon and variance are 0) r is 0: the output is the bias and dx is 0.

Autodiff of nnx keeps two or three arrays of x's size in float32, whatever the dtype of x. All sums
run in float32, forward as in nnx and backward too.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.moments import Devices, Moments, moments
from flax_customgrad.numerics.accumulation import accumulator


@dataclass(frozen=True)
class NormConfig:
    """The choices of a normalization that are not arrays.

    Attributes:
        axes: what shares statistics, and along what scale and bias vary.
        epsilon: added to the variance.
        dtype: dtype of the output, in which nnx rounds the input as well.
        centered: whether the mean is taken out.
        devices: the devices that share statistics.
        residual: what the backward keeps to find x^ again, "input" or "output".
    """

    axes: NormAxes
    epsilon: float
    dtype: Any
    centered: bool = True
    devices: Devices = field(default_factory=Devices)
    residual: Literal["input", "output"] = "input"


class Statistics(NamedTuple):
    """What an input was normalized by, in float32 or wider.

    `NormAxes.spread` makes each broadcast against the input.
    """

    mean: jax.Array
    """The mean; 0 where it is not taken out."""
    variance: jax.Array
    """The mean square about the mean."""
    n: jax.Array
    """How many elements there were, over all devices."""


class Residuals(NamedTuple):
    """What the backward keeps: arrays that the caller holds, and small ones."""

    params: Parameters
    x_or_y: jax.Array
    mask: jax.Array | None
    moments: Moments
    how: NormConfig


@custom_vjp
def normalize(
    params: Parameters, x: jax.Array, mask: jax.Array | None, how: NormConfig
) -> tuple[jax.Array, Statistics]:
    """Normalizes an input by its own statistics, then scales and shifts it.

    Args:
        params: `scale` and `bias`, float, of as many elements as the feature axes have; or without.
        x: input of any shape, float.
        mask: bool, broadcastable to x: where statistics are taken; or None.
        how: axes, dtype and the rest.

    Returns:
        The output, of x's shape in `how.dtype`, and the statistics.
    """
    return _normalize(params, x, mask, how)[0]


def _normalize(
    params: Parameters, x: jax.Array, mask: jax.Array | None, how: NormConfig
) -> tuple[tuple[jax.Array, Statistics], Moments]:
    wide = _widened(x, how)
    found = moments(wide, mask, how.axes, how.devices, how.epsilon, how.centered)
    y = _standardized(wide, found, how)
    if "scale" in params:
        y = y * how.axes.along(params["scale"], x.shape)
    if "bias" in params:
        y = y + how.axes.along(params["bias"], x.shape)
    statistics = Statistics(found.shift + found.correction, found.variance, found.n)
    return (y.astype(how.dtype), statistics), found


def _fwd(
    params: Parameters, x: jax.Array, mask: jax.Array | None, how: NormConfig
) -> tuple[tuple[jax.Array, Statistics], Residuals]:
    out, found = _normalize(params, x, mask, how)
    if how.residual == "input":
        return out, Residuals(params, x, mask, found, how)
    if "scale" in params:
        jax.debug.callback(reject_zeros, params["scale"])
    return out, Residuals(params, out[0], mask, found, how)


def _bwd(
    res: Residuals, cotangents: tuple[jax.Array, Statistics]
) -> tuple[nnx.State, jax.Array, None, None]:
    params, found, how, axes = res.params, res.moments, res.how, res.how.axes
    g = cotangents[0].astype(accumulator(cotangents[0]))
    standardized = _standardized_again(res)
    chex.assert_equal_shape([standardized, g])
    scale = axes.along(params["scale"], g.shape) if "scale" in params else 1

    # First over the axes without features: the gradients of bias and scale want no more.
    sums = {"bias": axes.sum_plain(g), "scale": axes.sum_plain(g * standardized)}
    grads = {name: axes.of_parameter(sums[name], params[name]) for name in params}
    chex.assert_trees_all_equal_shapes(grads, dict(params))

    # The statistics' own cotangents enter like sums: dmean = -sum(h) / r and dvar = -sum(h x^)/2r^2
    # would undo the bracket. They are divided twice because 1 / r^2 may overflow.
    r = jnp.where(found.rstd > 0, found.rstd, 1)
    dmean, dvar = (how.devices.own(ct, like=g) / r for ct in cotangents[1][:2])
    h = axes.sum_features(scale * sums["bias"]) - dmean
    hx = axes.sum_features(scale * sums["scale"]) - 2 * dvar / r
    h, hx = (s / jnp.maximum(found.n, 1) for s in how.devices.sum(h, hx))

    # What XLA takes for other statistics it does not share with the sums: an r spread over the
    # input, and where the sums are a pass of their own x^ itself, it would hold as arrays.
    again = Moments(*lax.optimization_barrier(tuple(found)))
    if axes.plain:
        standardized = _standardized_again(res._replace(moments=again))
    taken = standardized * axes.spread(hx, g.shape)
    if how.centered:
        taken = taken + axes.spread(h, g.shape)
    if res.mask is not None:
        taken = jnp.where(res.mask, taken, 0)
    dx = axes.spread(again.rstd, g.shape) * (scale * g - taken)
    return nnx.State(grads), dx, None, None


normalize.defvjp(_fwd, _bwd)


def _widened(x: jax.Array, how: NormConfig) -> jax.Array:
    """The input rounded as nnx rounds it, in the dtype of the sums."""
    return x.astype(how.dtype).astype(jnp.promote_types(how.dtype, jnp.float32))


def _standardized(x: jax.Array, found: Moments, how: NormConfig) -> jax.Array:
    """x^: the input in units of its standard deviation."""
    m, c, r = (how.axes.spread(a, x.shape) for a in (found.shift, found.correction, found.rstd))
    return ((x - m) - c) * r if how.centered else x * r


def _standardized_again(res: Residuals) -> jax.Array:
    """x^ from what was kept."""
    x_or_y = _widened(res.x_or_y, res.how)
    if res.how.residual == "input":
        return _standardized(x_or_y, res.moments, res.how)
    for name, undo in (("bias", jnp.subtract), ("scale", jnp.divide)):
        if name in res.params:
            x_or_y = undo(x_or_y, res.how.axes.along(res.params[name], x_or_y.shape))
    return x_or_y


def reject_zeros(scale: Any) -> None:
    """Runs on the host, because a traced scale is known nowhere else."""
    zeros = [i for i, s in enumerate(scale.ravel()) if s == 0]
    if zeros:
        raise ValueError(
            "residual='output' finds the normalized input from the output by dividing by the "
            f"scale, which is 0 for the features {zeros[:10]}: use residual='input'"
        )
