"""`normalize`: the operation of every normalization of activations, and its gradient.

    forward   x_hat   = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
              y       = scale x_hat + bias
    backward  h       = scale g
              mean_h  = sum(h) / n
              mean_hx = sum(h x_hat) / n
              dx      = rstd (h - mean_h - x_hat mean_hx)
              dscale  = sum(g x_hat),  dbias = sum(g)
    kept      x and the parameters, as they came, and per statistic three numbers (`moments`);
              or, with residual="output", y in the place of x: x_hat = (y - bias) / scale

The backward, step by step, for n elements that share a statistic. h is the cotangent of x_hat, and
(i = j) is 1 where it holds, else 0:

    ∂mean/∂x_i     = 1 / n
    ∂variance/∂x_i = 2 (x_i - mean) / n                     the part by way of the mean is 0
    ∂rstd/∂x_i     = -rstd^3 / 2 ∂variance/∂x_i = -rstd^2 x_hat_i / n
    ∂x_hat_j/∂x_i  = rstd ((i = j) - ∂mean/∂x_i) + (x_j - mean) ∂rstd/∂x_i
                   = rstd ((i = j) - 1 / n - x_hat_j x_hat_i / n)
    dx_i           = sum_j h_j ∂x_hat_j/∂x_i = rstd (h_i - mean_h - x_hat_i mean_hx)

The n elements that share a statistic lie along the reduced axes; scale and bias vary along the
feature axes. The statistics are outputs as well, from which no gradient comes: a layer writes them
down.

With a mask the statistics are those of the elements where it is True. The sums run over all
elements, because all were normalized, and `mean_h + x_hat mean_hx` is subtracted only where the
mask is True. Without a mean (RMSNorm) mean_h is left out. Where there is nothing to divide by (all
is masked, or epsilon and variance are 0) rstd is 0: the output is the bias and dx is 0.

Autodiff of nnx keeps two or three arrays of x's size in float32, whatever the dtype of x. All sums
run in float32, forward as in nnx and backward too. On one CPU each pass of the backward reads g and
x for itself: XLA would store what several passes need, in float32 (`in_turn`). The sums of many
rows and their dx are one pass, which XLA fuses (`fused`).
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.fused import fuses, normalized_alone
from flax_customgrad.layers.normalization.moments import Moments, Standard, moments, share_of
from flax_customgrad.numerics.accumulation import fusion_barrier, in_turn
from flax_customgrad.numerics.platform import is_one_cpu


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
    """What the backward of `normalize` keeps: arrays that the caller holds, and small ones."""

    params: Parameters
    x_or_y: jax.Array
    mask: jax.Array | None
    standard: Standard
    n: jax.Array
    config: NormConfig


@custom_vjp(leading_axes=True)
def normalize(
    params: Parameters, x: jax.Array, mask: jax.Array | None, config: NormConfig
) -> tuple[jax.Array, Statistics | None]:
    """Normalizes an input by its own statistics, then scales and shifts it.

    Args:
        params: `scale` and `bias`, float, of as many elements as the feature axes have; or without.
        x: input of any shape, float.
        mask: bool, of as many axes as x and broadcastable to it: where statistics are taken; or
            None.
        config: axes, dtype and the rest.

    Returns:
        The output, of x's shape in `config.dtype`, and the statistics, which have no gradient, or
        None for `config.with_statistics` False.
    """
    if mask is None and not config.with_statistics and fuses(config, x):
        return normalized_alone(params, x, config), None
    is_widened = x.dtype != config.sum_dtype
    return normalized(params, x, mask, config, is_widened)[0]


# In float32 a forward computes what the function itself does: it is traced once for both.
@functools.partial(jax.jit, static_argnums=(3, 4))
def normalized(
    params: Parameters,
    x: jax.Array,
    mask: jax.Array | None,
    config: NormConfig,
    apart: bool,
) -> tuple[tuple[jax.Array, Statistics | None], Moments]:
    """What `normalize` returns, and what its backward needs beside x or y.

    Args:
        params: those of `normalize`.
        x: input of any shape, float.
        mask: that of `normalize`.
        config: axes, dtype and the rest.
        apart: whether each pass over x widens it for itself. A backward that reads x again would
            store more for that.
    """
    axes, dtype, x = config.axes, config.sum_dtype, config.rounded(x)
    found = moments(x, mask, axes, config.devices, config.epsilon, config.centered, dtype, apart)
    rstd, mean = found.standard
    # Barrier: XLA would make the choice that rstd ends with anew for each element of x.
    standard = Standard(lax.optimization_barrier(rstd), mean)
    found = found._replace(standard=standard)
    x = in_turn(x, standard.rstd) if apart else x
    of_features = axes.of_features(standard, x.shape)
    y = axes.scaled_and_shifted(_x_hat(x.astype(dtype), of_features, axes), params)
    statistics = None
    if config.with_statistics:
        whole = lax.full_like(rstd, 0) if mean is None else lax.add(*mean)
        statistics = lax.stop_gradient(Statistics(whole, found.variance, found.n))
    return (y.astype(config.dtype), statistics), found


def _fwd(
    params: Parameters, x: jax.Array, mask: jax.Array | None, config: NormConfig
) -> tuple[tuple[jax.Array, Statistics | None], Residuals]:
    # Half precision that a backward reads as it is: nothing is widened for two passes.
    is_apart = mask is None and fuses(config, x) and x.dtype != config.sum_dtype
    out, found = normalized(params, x, mask, config, is_apart)
    if config.residual == "input":
        return out, Residuals(params, x, mask, found.standard, found.n, config)
    if "scale" in params:
        jax.debug.callback(reject_zeros, params["scale"])
    return out, Residuals(params, out[0], mask, found.standard, found.n, config)


def normalize_bwd(
    res: Residuals, cotangents: tuple[jax.Array, Statistics | None]
) -> tuple[nnx.State, jax.Array, None, None]:
    """The backward of `normalize`: the cotangents of its parameters and of x."""
    g, config = cotangents[0], res.config
    chex.assert_shape(jax.tree.leaves(res.standard), config.axes.statistic_shape(g.shape))
    # Of float32 XLA stores nothing for sums along the same axes, and with a mean x_hat alone.
    is_half = {res.x_or_y.dtype, g.dtype} != {np.dtype(config.sum_dtype)}
    is_fused = res.mask is None and fuses(config, g)
    is_apart = is_one_cpu() and (is_fused or is_half or not (config.axes.plain or config.centered))
    return (*_gradients(res._replace(config=None), g, config, is_apart, is_fused), None, None)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _gradients(
    res: Residuals, cotangent: jax.Array, config: NormConfig, is_apart: bool, is_fused: bool
) -> tuple[nnx.State, jax.Array]:
    res = res._replace(config=config)
    params, axes = res.params, config.axes
    g = cotangent.astype(config.sum_dtype)
    standard = axes.of_features(res.standard, g.shape)
    x_hat = _x_hat_again(res, standard)
    chex.assert_equal_shape([g, x_hat])
    chex.assert_type([g, x_hat, *jax.tree.leaves(standard)], config.sum_dtype)
    # Barrier: XLA would store the scale spread over the input, to share it with the forward.
    scale = lax.optimization_barrier(params.get("scale"))

    def scaled(a: jax.Array) -> jax.Array:
        return a if scale is None else lax.mul(a, axes.along(scale.astype(a.dtype), a.shape))

    h = scaled(g)

    def read_g(done: Any) -> jax.Array:
        """g, for a pass over it that begins when another is done."""
        return in_turn(cotangent, done).astype(g.dtype) if is_apart else g

    def read_h(done: Any) -> jax.Array:
        """h, likewise."""
        return scaled(read_g(done)) if is_apart else h

    def read_x_hat(done: Any) -> jax.Array:
        """x_hat, likewise."""
        if not is_apart:
            return x_hat
        x_or_y, found = in_turn((res.x_or_y, standard), done)
        return _x_hat_again(res._replace(x_or_y=x_or_y), found)

    if axes.plain:
        # First over the axes without features: dscale and dbias need no more.
        sum_g = axes.sum_plain(read_g(standard))
        sum_gx = axes.sum_plain(lax.mul(read_g(sum_g), read_x_hat(sum_g)))
        partial = {"scale": sum_gx, "bias": sum_g}
        grads = {name: axes.parameter_sum(partial[name], p) for name, p in params.items()}
        if "scale" in params:
            of_features = axes.along_partial(params["scale"], sum_g).astype(g.dtype)
            sum_g, sum_gx = lax.mul(sum_g, of_features), lax.mul(sum_gx, of_features)
        sum_h, sum_hx = axes.sum_features(sum_g), axes.sum_features(sum_gx)
    else:
        grads, done = {}, standard
        if "bias" in params:
            done = grads["bias"] = axes.parameter_sum(read_g(done), params["bias"])
        if "scale" in params:
            of_scale = lax.mul(read_g(done), read_x_hat(done))
            done = grads["scale"] = axes.parameter_sum(of_scale, params["scale"])
        if is_fused:
            # XLA fuses dx and the sums for it into one pass, if no other shares what that reads.
            read = in_turn((cotangent, res.x_or_y, standard, scale), done)
            cotangent, x_or_y, standard, scale = read
            x_hat = _x_hat_again(res._replace(x_or_y=x_or_y), standard)
            g = cotangent.astype(g.dtype)
            h, is_apart = scaled(g), False
        # Both sums are of h: on a mesh that splits the scale it is gathered once.
        sum_h = axes.sum_features(h) if config.centered else jnp.zeros_like(standard.rstd)
        sum_hx = axes.sum_features(lax.mul(read_h(done), read_x_hat(done)))
    chex.assert_trees_all_equal_shapes(grads, dict(params))

    share = _share(res, g)
    mean_h, mean_hx = (lax.mul(s, share) for s in config.devices.sum(sum_h, sum_hx))
    if axes.groups is not None and not axes.plain:
        # As one pass with the sums over parts of the last axis dx would take twice as long.
        mean_h, mean_hx = fusion_barrier(mean_h), fusion_barrier(mean_hx)

    # Barrier: stops XLA from sharing an rstd spread over the input, and where the sums are a pass
    # of their own x_hat itself, with those passes, which would store them as arrays.
    again = lax.optimization_barrier(standard)
    x_hat = read_x_hat(mean_hx) if is_apart or not axes.plain else _x_hat_again(res, again)
    h = read_h(mean_hx)
    mean_h, mean_hx = axes.of_features((mean_h, mean_hx), g.shape)
    mean_h, mean_hx, rstd = axes.spread((mean_h, mean_hx, again.rstd), g.shape)
    subtracted = lax.mul(x_hat, mean_hx)
    if config.centered:
        subtracted = lax.add(subtracted, mean_h)
    if res.mask is not None:
        subtracted = jnp.where(res.mask, subtracted, 0)
    dx = lax.mul(lax.sub(h, subtracted), rstd)
    return nnx.State(grads), dx


normalize.defvjp(_fwd, normalize_bwd)


def _share(res: Residuals, g: jax.Array) -> jax.Array:
    """1 / the number of elements that share a statistic."""
    is_known = res.mask is None and res.config.devices.axis_name is None
    return share_of(res.config.axes.count(g.shape) if is_known else res.n, g.dtype)


def _x_hat(x: jax.Array, standard: Standard, axes: NormAxes) -> jax.Array:
    """The normalized input."""
    rstd, mean = axes.spread(standard, x.shape)
    return lax.mul(x if mean is None else mean.subtracted_from(x), rstd)


def _x_hat_again(res: Residuals, standard: Standard) -> jax.Array:
    """The normalized input, from what was kept."""
    params, config = res.params, res.config
    if config.residual == "input":
        x = config.rounded(res.x_or_y).astype(config.sum_dtype)
        return _x_hat(x, standard, config.axes)
    x_hat = res.x_or_y.astype(config.sum_dtype)
    for name, undo in (("bias", jnp.subtract), ("scale", jnp.divide)):
        if name in params:
            x_hat = undo(x_hat, config.axes.along(params[name], x_hat.shape))
    return x_hat


def reject_zeros(scale: Any) -> None:
    """Refuses a scale of 0; it runs on the host, because a traced scale is known nowhere else.

    Args:
        scale: the scale.

    Raises:
        ValueError: an element is 0.
    """
    # NumPy, because inside of a trace what jax.numpy makes of a known array is traced.
    zeros = np.flatnonzero(np.asarray(scale) == 0).tolist()
    if zeros:
        raise ValueError(
            "residual='output' finds the normalized input from the output by dividing by the "
            f"scale, which is 0 for the features {zeros[:10]}: use residual='input'"
        )
