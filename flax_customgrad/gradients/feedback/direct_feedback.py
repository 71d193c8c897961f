"""Direct feedback alignment: each layer of a chain gets the error of the output.

    forward   h[0] = x,  h[i] = layer[i](h[i-1]),  y = h[n]
    backward  e[n] = g
              e[i] = g feedback[i]  for i < n                feedback[i]: fixed and random
              dparams[i] = the gradient of layer[i] for its parameters, at the cotangent e[i]
              dx         = the gradient of layer[1] for its input, at e[1]
    kept      x, the parameters, and the state of the layers as it was before the call

The backward is composed: the gradient of a layer is JAX's VJP of it, and a layer is anything that
is called with one array. `dx` is what the first layer sends back.

No layer waits for the error of the next one, so the backward goes through the chain from its first
layer to its last: it computes `h[i]` anew, has `e[i]` at once, and is done with the layer. Where
forward and backward are one program XLA merges the two `h[i]` and keeps them; in a `lax.scan` the
second one costs a forward, and the memory falls: 312 MB -> 60 for a scan of 4 over 8 layers of
4096x256.

Source: arXiv:1609.01596
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.gradients.feedback.feedback_variable import Feedback
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import input_gradient
from flax_customgrad.numerics.sharding import summed_like, varying_like

Shape = tuple[int, ...]


class Residuals(NamedTuple):
    """What the backward of `chain` keeps: the module as it was before the call, and x."""

    graphdef: Any
    state: Any
    x: jax.Array


@custom_vjp(surrogate=True)
def chain(module: Any, x: jax.Array) -> jax.Array:
    """Calls layers one after another.

    Args:
        module: the layers, and the feedback matrices.
        x: the input of the first.

    Returns:
        The output of the last.
    """
    outputs = []
    for layer in module.layers:
        x = layer(x)
        outputs.append(x)
    _check_outputs(outputs, module.features)
    return x


def _fwd(module: Any, x: jax.Array) -> tuple[jax.Array, Residuals]:
    # A copy from before the call, which may write: the backward repeats it, with the same dropout.
    graphdef, state = nnx.split(nnx.clone(module, graph=True), graph=True)
    return chain(module, x), Residuals(graphdef, state, x)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    module, h = nnx.merge(res.graphdef, res.state), res.x
    last = len(module.layers) - 1
    dparams, dh = {}, []
    for i, layer in enumerate(module.layers):
        h, pull = _vjp(layer, h)
        e = g if i == last else _project(g, module.feedback[i][...], like=h)
        chex.assert_equal_shape([e, h])
        of_params, of_input = pull(e)
        if of_params:
            dparams[i] = of_params
        dh.append(of_input)
    dx = dh[0]
    chex.assert_equal_shape([dx, res.x])
    return nnx.State({"layers": dparams}), dx


chain.defvjp(_fwd, _bwd)


def _vjp(layer: Any, x: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
    """Calls a layer, which may write; returns its output, and its gradients at an error."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ..., graph=True)

    def call(params: nnx.State, x: jax.Array) -> tuple[jax.Array, Any]:
        copy = nnx.merge(graphdef, params, rest, copy=True)
        return copy(x), nnx.split(copy, nnx.Param, ..., graph=True)[2]

    y, pull, written = jax.vjp(call, params, x, has_aux=True)
    if isinstance(layer, nnx.Module):
        nnx.update(layer, written)
    return y, pull


def _project(g: jax.Array, feedback: jax.Array, like: jax.Array) -> jax.Array:
    """The error of a hidden layer: `g` (*batch, *out) times `feedback` (*out, *hidden)."""
    n_out = (g.ndim - like.ndim + feedback.ndim) // 2
    over_out = ((range(g.ndim - n_out, g.ndim), range(n_out)), ((), ()))
    chex.assert_shape(feedback, (*g.shape[g.ndim - n_out :], *like.shape[g.ndim - n_out :]))
    wide = accumulator(g, feedback)
    e = input_gradient(g.astype(wide), feedback.astype(wide), over_out, like=like)
    return varying_like(summed_like(e.astype(like.dtype), like), like)


class DirectFeedback(nnx.Module):
    """Layers one after another, each of which gets the error of the output.

    The last layer gets it as it is, and each hidden one times a fixed random matrix. Put an
    activation inside the layer that it belongs to: what is sent back goes to the output of a layer.
    State that a layer writes, such as the statistics of `nnx.BatchNorm` or the streams of
    `nnx.Dropout`, is written once, in the forward. Inside `use_autodiff` the backward stays.

    Args:
        *layers: Modules or functions of one array, each once.
        features: for each layer the shape of what it puts out, without the batch axes that all
            share: an int for one axis. By default its `out_features`; of an `nnx.Sequential`, of
            the last of its layers that has any.
        feedback_init: initializer of the feedback matrices, each of shape (out, hidden); by
            default normal with a deviation of 1 / sqrt(out).
        param_dtype: their dtype.
        rngs: random number generators; the matrices are drawn from `params`.

    Attributes:
        layers: the layers.
        features: for each layer a tuple, the shape of what it puts out.
        feedback: for each hidden layer a `Feedback` of shape (*out, *hidden).

    Raises:
        TypeError: something that is called a layer is not callable.
        ValueError: there is no layer, one comes twice, or the features are not known.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = fcg.DirectFeedback(
        ...     nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.tanh),
        ...     nnx.Sequential(nnx.Linear(32, 16, rngs=rngs), nnx.tanh),
        ...     nnx.Linear(16, 2, rngs=rngs),
        ...     rngs=rngs,
        ... )
        >>> [matrix.shape for matrix in model.feedback]
        [(2, 32), (2, 16)]
        >>> model(jnp.ones((5, 8))).shape
        (5, 2)

    Source: arXiv:1609.01596
    """

    def __init__(
        self,
        *layers: Callable[[Any], Any],
        features: Sequence[int | Sequence[int]] | None = None,
        feedback_init: Initializer = default_kernel_init,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_layers(layers)
        self.layers = nnx.List(layers)
        self.features = _known_features(layers, features)
        *hidden, out = self.features
        self.feedback = nnx.List(
            Feedback(
                feedback_init(rngs.params(), (math.prod(out), math.prod(h)), param_dtype).reshape(
                    *out, *h
                )
            )
            for h in hidden
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layers.

        Args:
            x: array of shape (*batch, *in), what the first layer takes.

        Returns:
            Array of shape (*batch, *out), what the last one puts out.

        Raises:
            ValueError: a layer puts out an array of another shape than `features` says.
        """
        return chain(self, as_array(x))


def _check_layers(layers: Sequence[Any]) -> None:
    if not layers:
        raise ValueError(
            "DirectFeedback: no layer was given; write DirectFeedback(first, ..., last)"
        )
    for i, layer in enumerate(layers):
        if not callable(layer):
            raise TypeError(f"DirectFeedback: layer {i} is a {type(layer).__name__}, not callable")
        if isinstance(layer, nnx.Module) and any(layer is other for other in layers[:i]):
            raise ValueError(
                f"DirectFeedback: layer {i} comes twice; parameters that layers share have no "
                "gradient of one layer"
            )


def _known_features(
    layers: Sequence[Any], given: Sequence[int | Sequence[int]] | None
) -> tuple[Shape, ...]:
    """For each layer the shape of what it puts out, as given or as the layers say."""
    features = [_features_of(layer) for layer in layers] if given is None else given
    if len(features) != len(layers):
        raise ValueError(
            f"DirectFeedback: features={tuple(features)!r} are {len(features)}, and there are "
            f"{len(layers)} layers; write one for each layer, the last included"
        )
    if None in features:
        i = features.index(None)
        name = getattr(layers[i], "__name__", type(layers[i]).__name__)
        raise ValueError(
            f"DirectFeedback: layer {i}, {name}, has no out_features: write features=(...), the "
            "features that each layer puts out, or put a function inside the layer before it, "
            "nnx.Sequential(layer, function)"
        )
    return tuple((f,) if isinstance(f, int) else tuple(f) for f in features if f is not None)


def _features_of(layer: Any) -> int | Sequence[int] | None:
    if isinstance(layer, nnx.Sequential):
        said = map(_features_of, reversed(tuple(layer.layers)))
        return next((features for features in said if features is not None), None)
    return getattr(layer, "out_features", None)


def _check_outputs(outputs: Sequence[jax.Array], features: Sequence[Shape]) -> None:
    """Checks that each output is of shape (*batch, *features), with the batch of the last."""
    batch = outputs[-1].shape[: outputs[-1].ndim - len(features[-1])]
    for i, (output, f) in enumerate(zip(outputs, features, strict=True)):
        if output.shape != (*batch, *f):
            raise ValueError(
                f"DirectFeedback: layer {i} puts out {output.shape}, and features={features[i]} "
                f"after the batch axes {batch} of the output are {(*batch, *f)}: write the "
                "features of each layer, features=(...), with every axis that is not a batch axis"
            )
