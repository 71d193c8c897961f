"""`linear_cross_entropy`: the loss of an output layer, given by the layer itself or its kernel."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.linear.embed import Embed
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.losses.chunked_cross_entropy import OutputConfig, summed_cross_entropy
from flax_customgrad.layers.losses.cross_entropy_rows import CrossEntropyConfig
from flax_customgrad.layers.losses.labels import check_share, class_numbers, static_number
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_positive, check_size, check_word
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig

_NAME = "linear_cross_entropy"
_CHUNK = 2**23
"""How many logits a chunk has by default, 32 MB of them."""
_LEAST_ROWS = 128
"""The fewest rows by default: each chunk reads the whole kernel."""


def linear_cross_entropy(
    hidden: ArrayLike,
    head: nnx.Linear | nnx.Embed | ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
    chunk_rows: int | None = None,
    dtype: Any = None,
    precision: Any = None,
) -> jax.Array:
    """The softmax cross entropy of an output layer, whose logits are never there all at once.

    It is `softmax_cross_entropy(head(hidden), labels)`, reduced; logits are computed for a chunk of
    rows at a time, in float32. For "mean" and "sum" a forward that is differentiated computes the
    gradients from the same chunk, and the backward scales them. For "none", and under `jax.vmap`
    with one head for all examples, the backward computes the logits again: 1.3 times the time.

    On a mesh that splits the rows use Explicit axes, or `jax.shard_map`: there each device loops
    over its own rows, and the gradient of the kernel is summed over the devices once. With Auto
    axes XLA sums it in every chunk. A "mean" exchanges one number more than a "sum", how many rows
    count.

    Args:
        hidden: array of shape (..., features), float.
        head: an `nnx.Linear`; an `nnx.Embed`, whose table is multiplied as its `attend` does; or a
            kernel of shape (features, classes), `table.T` for a table.
        labels: numbers of classes, integers of shape (...).
        bias: array of shape (classes,), for a head that is a kernel.
        weights: weights of the losses, of shape (...), float; None for 1. They have a gradient.
        reduction: "mean", the sum of weighted losses divided by that of the weights, of the rows
            that count; "sum"; or "none".
        softcap: bound of the logits, `softcap tanh(logits / softcap)`; None for no bound.
        label_smoothing: the share of a label that is spread over all classes, from 0 to below 1.
        z_loss: weight of the square of the logarithm of the softmax's denominator, which is added.
        ignore_index: the label of rows that do not count: loss and gradient are 0, whatever they
            hold.
        chunk_rows: how many rows of logits exist at a time, on a mesh with Explicit axes that split
            the rows on each device. By default 128, or more where that is less than 32 MB.
        dtype: dtype of the product, for a head that is a kernel; None for the promoted one.
        precision: `jax.lax.Precision` of the products, for a head that is a kernel.

    Returns:
        A number, or for "none" losses of shape (...); float32 or wider. Where no row counts, it is
        0. A label that is no class is an error; where labels are traced, the row does not count.

    Raises:
        TypeError: the head computes something else than a product with its kernel and a bias; or
            an argument belongs to a kernel, and the head is a layer.
        ValueError: shapes do not fit, or a label is no class.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> head = fcg.Linear(4, 1000, rngs=nnx.Rngs(0))
        >>> fcg.linear_cross_entropy(jnp.zeros((2, 3, 4)), head, jnp.ones((2, 3), int))
        Array(6.9077554, dtype=float32)

    Source: arXiv:2411.09009
    """
    check_word(_NAME, "reduction", reduction, ("mean", "sum", "none"))
    x, labels = jnp.asarray(as_array(hidden)), jnp.asarray(as_array(labels))
    params, class_axis, product = _output_layer(head, bias, dtype, precision)
    features, classes = (params["kernel"].shape[n] for n in (1 - class_axis, class_axis))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{_NAME}: hidden is {x.dtype}; expected real floating numbers")
    if x.ndim == 0 or x.shape[-1] != features or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{_NAME}: hidden has shape {x.shape} and labels {labels.shape}; expected "
            f"(..., {features}) and (...)"
        )
    labels = class_numbers(_NAME, labels, classes, ignore_index)
    dtype = accumulator(*product.promote(x, params["kernel"]))
    w = None
    if weights is not None:
        w = jnp.broadcast_to(jnp.asarray(as_array(weights), dtype), labels.shape)
    if chunk_rows is None:
        chunk_rows = max(_LEAST_ROWS, _CHUNK // max(classes, 1))
    config = OutputConfig(
        class_axis,
        None if softcap is None else static_number(_NAME, "softcap", softcap),
        check_size(_NAME, "chunk_rows", chunk_rows),
        CrossEntropyConfig(
            (-1,),
            check_share(_NAME, "label_smoothing", label_smoothing),
            static_number(_NAME, "z_loss", z_loss),
        ),
        product,
    )
    if softcap is not None:
        check_positive(_NAME, "softcap", config.softcap)
    if reduction == "none":  # a sum of one row each
        w = None if w is None else w[..., None]
        return summed_cross_entropy(params, x[..., None, :], labels[..., None], w, config)
    x, labels = x.reshape(-1, features), labels.reshape(-1)
    w = None if w is None else w.reshape(-1)
    loss = summed_cross_entropy(params, x, labels, w, config)
    if reduction == "sum":
        return loss
    weight = jnp.sum(jnp.where(labels >= 0, 1 if w is None else w, 0), dtype=dtype)
    return loss / jnp.where(weight == 0, 1, weight)


def _output_layer(
    head: Any, bias: Any, dtype: Any, precision: Any
) -> tuple[Parameters, int, MatmulConfig]:
    """The parameters of an output layer, the axis of its classes, and how it multiplies."""
    if not isinstance(head, nnx.Module):
        kernel = jnp.asarray(as_array(head))
        arrays = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": as_array(bias)}
        _check_shapes(arrays, 1)
        return nnx.State(arrays), 1, MatmulConfig(dtype, precision)
    if any(argument is not None for argument in (bias, dtype, precision)):
        raise TypeError(
            f"{_NAME}: bias, dtype and precision are those of the head, a {type(head).__name__}"
        )
    layer: Any = head
    own = getattr(layer, "promote_dtype", None) is nnx_dtypes.promote_dtype
    if own and _is_linear(layer):
        params = parameters(layer, "kernel", "bias")
        _check_shapes(params, 1)
        return params, 1, MatmulConfig(layer.dtype, layer.precision)
    if own and getattr(type(layer), "attend", None) in (nnx.Embed.attend, Embed.attend):
        params = nnx.State({"kernel": parameters(layer, "embedding")["embedding"]})
        _check_shapes(params, 0)
        return params, 0, MatmulConfig(layer.dtype)
    raise TypeError(
        f"{_NAME}: the head is a {type(head).__name__} that computes in a way of its own; it takes "
        "an nnx.Linear, an nnx.Embed or a kernel. Write softmax_cross_entropy(head(hidden), labels)"
    )


def _is_linear(head: Any) -> bool:
    """Whether a layer computes what nnx.Linear does, and with its product."""
    calls = (nnx.Linear.__call__, Linear.__call__)
    return type(head).__call__ in calls and head.dot_general is lax.dot_general


def _check_shapes(params: Any, class_axis: int) -> None:
    kernel, bias = params["kernel"], params.get("bias")
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"{_NAME}: the kernel is {kernel.dtype}{list(kernel.shape)}; expected real floating "
            "numbers of shape (features, classes)"
        )
    if bias is not None and bias.shape != kernel.shape[class_axis : class_axis + 1]:
        raise ValueError(
            f"{_NAME}: the bias has shape {bias.shape}; expected ({kernel.shape[class_axis]},)"
        )
