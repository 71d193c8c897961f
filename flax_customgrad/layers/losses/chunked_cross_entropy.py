"""The cross entropy of an output layer's logits, of which only a chunk of rows exists at a time.

    forward   u    = x kernel + bias,  z = softcap tanh(u / softcap), or u
              loss = sum w l                  l the loss of each row of z (`cross_entropy_rows`)
    backward  du   = g w dl/dz (1 - (z / softcap)^2)
              dx   = du kernel^T,  dkernel = x^T du,  dbias = sum du,  dw = g l
    kept      for one sum: the gradients for g = 1, which the forward computes on the way, and l
              for a sum of each example: x, the labels, w and the parameters; the backward computes
              u again, chunk by chunk

By the chain rule, through the soft cap and the product:

    ∂z/∂u = 1 - tanh(u / softcap)^2 = 1 - (z / softcap)^2
    du    = g w ∂l/∂z ∂z/∂u
    dx    = du kernel^T                    as for any product, `linear`

The g of one sum is a number, a factor of every gradient. So a forward that will be differentiated
computes the gradients from the chunk of logits that it has, instead of computing that twice. Logits
and sums are float32; du has the dtype of the product. A chunk takes its rows from all over the
batch, so that on a mesh that splits the batch each device has a part of every chunk. With Explicit
axes, where that split is known, each device goes through chunks of its own rows, and the gradient
of the kernel is summed over the devices once, behind the loop. With Auto axes XLA sums it in every
iteration.

Source: arXiv:2411.09009, arXiv:2410.10989
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.losses.cross_entropy_rows import (
    CrossEntropyConfig,
    row_losses,
    row_slopes,
)
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.dtypes import in_dtype
from flax_customgrad.numerics.inline_jit import inline_jit
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_spec, varying_like, with_auto_axes

Gradients = tuple[jax.Array, Mapping[str, jax.Array]]
"""Those of x and of the parameters."""


@dataclass(frozen=True)
class OutputConfig:
    """The choices of an output layer and its loss that are not arrays.

    Attributes:
        class_axis: the axis of the kernel along which the classes are: 1, and 0 of a table.
        softcap: the bound of the logits, or None.
        chunk_rows: how many rows of logits exist at a time.
        loss: the choices of the cross entropy.
        product: dtype and precision of the product.
    """

    class_axis: int = 1
    softcap: float | None = None
    chunk_rows: int = 256
    loss: CrossEntropyConfig = field(default_factory=CrossEntropyConfig)
    product: MatmulConfig = field(default_factory=MatmulConfig)


class Residuals(NamedTuple):
    """What the backward of `summed_cross_entropy` keeps.

    Attributes:
        losses: those of the rows, for one sum with weights.
        gradients: for one sum, those of x and of the parameters.
        arguments: for a sum of each example, the parameters, x, the labels and the weights.
        config: the choices.
    """

    losses: jax.Array | None
    gradients: Gradients | None
    arguments: Any
    config: OutputConfig


@custom_vjp(leading_axes=True)
def summed_cross_entropy(
    params: Parameters, x: jax.Array, labels: jax.Array, w: jax.Array | None, config: OutputConfig
) -> jax.Array:
    """The weighted sum of the losses of some rows; one sum for each index of leading axes.

    Args:
        params: `kernel` of shape (features, classes), or (classes, features), float; `bias` of
            shape (classes,), or no bias.
        x: array of shape (..., rows, features), float.
        labels: numbers of classes of shape (..., rows), -1 for none.
        w: weights of shape (..., rows), float; None for 1.
        config: the choices.

    Returns:
        Sums of shape (...), float32 or wider.
    """
    losses = with_auto_axes(
        functools.partial(_losses, config), explicit_spec(labels), dict(params), x, labels
    )
    return jnp.sum(_times(w, losses), -1)


def _fwd(
    params: Parameters, x: jax.Array, labels: jax.Array, w: jax.Array | None, config: OutputConfig
) -> tuple[jax.Array, Residuals]:
    if x.ndim > 2:
        out = summed_cross_entropy(params, x, labels, w, config)
        return out, Residuals(None, None, (params, x, labels, w), config)
    g = jnp.ones_like(labels, accumulator(x, params["kernel"])) if w is None else w
    losses, gradients = _gradients(config, params, x, labels, g)
    kept = Residuals(None if w is None else losses, gradients, None, config)
    return jnp.sum(_times(w, losses), -1), kept


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, jax.Array | None, None]:
    if res.gradients is not None:
        chex.assert_shape(g, ())
        losses, (dx, dparams) = res.losses, res.gradients
        dx, dparams = g * dx, {name: g * d for name, d in dparams.items()}
    else:
        params, x, labels, w = res.arguments
        chex.assert_shape(g, labels.shape[:-1])
        of_rows = _times(w, jnp.broadcast_to(g[..., None], labels.shape))
        losses, (dx, dparams) = _gradients(res.config, params, x, labels, of_rows)
        chex.assert_equal_shape([dx, x])
        losses = None if w is None else losses
    dw = None if losses is None else g[..., None] * losses
    return nnx.State(dict(dparams)), dx, None, dw, None


summed_cross_entropy.defvjp(_fwd, _bwd)


def _times(w: jax.Array | None, losses: jax.Array) -> jax.Array:
    return losses if w is None else w * losses


def _gradients(
    config: OutputConfig, params: Parameters, x: jax.Array, labels: jax.Array, g: jax.Array
) -> tuple[jax.Array, Gradients]:
    """The losses, and the gradients for a cotangent of each loss."""
    specs = (
        explicit_spec(labels),
        (
            explicit_spec(x),
            {name: explicit_spec(p) for name, p in params.items()},
        ),
    )
    *of_rows, _ = explicit_spec(x)
    function = functools.partial(_of_each_device, config, tuple(of_rows))
    return with_auto_axes(function, specs, dict(params), x, labels, g)


def _of_each_device(
    config: OutputConfig,
    of_rows: tuple[Any, ...],
    params: Parameters,
    x: jax.Array,
    labels: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, Gradients]:
    """The losses and gradients, the loop over chunks on each device alone.

    Compiled as one loop for all devices, it would sum the gradient of the kernel over them in every
    iteration.

    Args:
        config: the choices.
        of_rows: the mesh axes that split each axis of rows, as in a `PartitionSpec`.
        params: the parameters.
        x: array of shape (..., rows, features).
        labels: numbers of classes of shape (..., rows).
        g: the cotangents of the losses, of that shape.
    """
    names = tuple(jax.tree.leaves(of_rows))
    sizes = jax.sharding.get_abstract_mesh().shape
    if all(sizes[name] == 1 for name in names):
        return _losses_and_gradients(config, params, x, labels, g)

    def of_own_rows(
        params: Parameters, x: jax.Array, labels: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, Gradients]:
        losses, (dx, dparams) = _losses_and_gradients(config, params, x, labels, g)
        return losses, (dx, lax.psum(dparams, names))

    rows, whole = PartitionSpec(*of_rows), PartitionSpec()
    mapped = jax.shard_map(
        of_own_rows,
        in_specs=(whole, rows, rows, rows),
        out_specs=(rows, (rows, whole)),
        axis_names=set(names),
    )
    return mapped(params, x, labels, g)


@inline_jit(static_argnums=0)
def _losses(config: OutputConfig, params: Parameters, x: jax.Array, labels: jax.Array) -> jax.Array:
    kernel, bias, x, *rows = _prepared(config, params, x, labels)

    def of_chunk(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        x, labels = chunk
        z = _logits(config, x, kernel, bias)
        return None, row_losses(z, labels[:, None], None, config.loss)[0][:, 0]

    _, losses = lax.scan(of_chunk, None, (x, *rows))
    return _from_chunks(losses, labels.shape)


@inline_jit(static_argnums=0)
def _losses_and_gradients(
    config: OutputConfig, params: Parameters, x: jax.Array, labels: jax.Array, g: jax.Array
) -> tuple[jax.Array, Gradients]:
    shape, like = x.shape, params["kernel"]
    kernel, bias, x, *rows = _prepared(config, params, x, labels, g)
    features, classes = 1 - config.class_axis, config.class_axis
    over_classes, over_rows = (((1,), (classes,)), ((), ())), (((0,), (0,)), ((), ()))

    def of_chunk(
        sums: dict[str, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
        x, labels, g = (a if a.ndim == 2 else a[:, None] for a in chunk)
        z = _logits(config, x, kernel, bias)
        losses, m, s = row_losses(z, labels, None, config.loss)
        du = row_slopes(z, labels, None, m, s, g, config.loss)
        if config.softcap is not None:
            du *= 1 - jnp.square(z / config.softcap)
        dbias, du = total(du, (0,)), in_dtype(du, x.dtype)
        dx = input_gradient(du, kernel, over_classes, like=x, precision=config.product.precision)
        dkernel = parameter_gradient(
            *((x, du) if features == 0 else (du, x)),
            over_rows,
            like=like,
            precision=config.product.precision,
        )
        added = {"kernel": dkernel, "bias": dbias}
        return {name: d + added[name] for name, d in sums.items()}, (losses[:, 0], dx)

    zeros = {name: jnp.zeros(p.shape, accumulator(x, kernel)) for name, p in params.items()}
    for array in (x, kernel, *rows):
        zeros = {name: varying_like(d, array) for name, d in zeros.items()}
    sums, (losses, dx) = lax.scan(of_chunk, zeros, (x, *rows))
    return _from_chunks(losses, labels.shape), (_from_chunks(dx, shape), sums)


def _logits(
    config: OutputConfig, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """The logits of a chunk, float32 or wider."""
    u = lax.dot_general(
        x,
        kernel,
        (((1,), (1 - config.class_axis,)), ((), ())),
        precision=config.product.precision,
        preferred_element_type=accumulator(x, kernel),
    )
    u = u if bias is None else u + bias.astype(u.dtype)
    return u if config.softcap is None else config.softcap * jnp.tanh(u / config.softcap)


def _prepared(
    config: OutputConfig, params: Parameters, x: jax.Array, labels: jax.Array, *rows: jax.Array
) -> tuple[Any, ...]:
    """Kernel, bias, and in chunks x, labels and further rows.

    What a row without a class holds may be anything, and is replaced by 0.
    """
    bias = params.get("bias")
    x = jnp.where((labels >= 0)[..., None], x, 0)
    x, kernel = config.product.promote(x, params["kernel"])
    chunks = [
        _in_chunks(a.reshape(-1, *a.shape[labels.ndim :]), config.chunk_rows, fill)
        for a, fill in ((x, 0), (labels, -1), *((r, 0) for r in rows))
    ]
    return kernel, bias, *chunks


def _in_chunks(rows: jax.Array, chunk_rows: int, fill: int) -> jax.Array:
    """Rows in chunks of one size, each of which takes every n-th row; the last are filled up.

    Args:
        rows: array of shape (rows, ...).
        chunk_rows: the largest size of a chunk.
        fill: what to fill up with.

    Returns:
        Array of shape (chunks, rows of a chunk, ...).
    """
    n = len(rows)
    chunks = max(1, math.ceil(n / chunk_rows))
    size = math.ceil(n / chunks)
    padding = [(0, chunks * size - n), *[(0, 0)] * (rows.ndim - 1)]
    rows = jnp.pad(rows, padding, constant_values=fill)
    return jnp.moveaxis(rows.reshape(size, chunks, *rows.shape[1:]), 1, 0)


def _from_chunks(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_in_chunks`; the array has the given shape."""
    rows = jnp.moveaxis(chunks, 0, 1)
    rows = rows.reshape(-1, *rows.shape[2:])
    n = math.prod(shape) // math.prod(rows.shape[1:]) if rows.size else 0
    return rows[:n].reshape(shape)
