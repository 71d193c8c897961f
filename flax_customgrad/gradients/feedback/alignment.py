"""Feedback alignment: a layer whose backward uses a fixed random kernel in place of its own.

    forward   y       = f(kernel, bias, x)
    backward  dx      = what the backward of f computes for x with `feedback` in place of `kernel`
              dkernel = what it computes for the kernel
              dbias   = what it computes for the bias
    kept      x, kernel, bias and feedback, as they came

The backward is composed: it is JAX's VJP of `f` at `feedback`, and `f` is `linear` or
`convolution`, each with a hand-written backward of its own. As `f` is linear in its kernel,
`dkernel` does not depend on the kernel, and one VJP gives all three. Nothing uses the forward that
`jax.vjp` repeats there, and XLA drops it. Over training the kernel comes to align with `feedback`,
and `dx` with the true gradient.

Source: arXiv:1411.0247
"""

from typing import Any, NamedTuple

import chex
import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import CustomVJP, custom_vjp
from flax_customgrad.layers.drop_in import Parameters, has_own_bias
from flax_customgrad.numerics.dtypes import as_array, is_supported_dtype, is_supported_float
from flax_customgrad.numerics.sharding import varying_like


class Residuals(NamedTuple):
    """What the backward of `apply_with_feedback` keeps: only what the caller holds anyway."""

    params: Parameters
    feedback: jax.Array
    x: jax.Array
    f: CustomVJP
    config: object


@custom_vjp(surrogate=True)
def apply_with_feedback(
    params: Parameters, feedback: jax.Array, x: jax.Array, f: CustomVJP, config: object
) -> jax.Array:
    """Applies `f` to parameters and inputs.

    Args:
        params: `kernel`, and `bias` or none.
        feedback: the kernel of the backward, of the shape of `kernel`, float.
        x: inputs, float.
        f: `linear` or `convolution`, a function of (params, x, config) that is linear in the
            kernel.
        config: its choices that are not arrays.

    Returns:
        What `f` returns.
    """
    return f(params, x, config)


def _fwd(
    params: Parameters, feedback: jax.Array, x: jax.Array, f: CustomVJP, config: object
) -> tuple[jax.Array, Residuals]:
    y = apply_with_feedback(params, feedback, x, f, config)
    return y, Residuals(params, feedback, x, f, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, None, jax.Array, None, None]:
    params, feedback, x = res.params, res.feedback, res.x
    chex.assert_equal_shape([feedback, params["kernel"]])
    kernel = params["kernel"]
    # In a shard_map the gradient goes where the array lives that it is taken at: the kernel's.
    feedback = varying_like(feedback.astype(kernel.dtype), kernel)
    at_feedback = nnx.State({**params, "kernel": feedback})
    y, pull = jax.vjp(lambda params, x: res.f(params, x, res.config), at_feedback, x)
    chex.assert_equal_shape([g, y])
    dparams, dx = pull(varying_like(g, y))
    chex.assert_trees_all_equal_structs(dparams, params)
    chex.assert_trees_all_equal_shapes_and_dtypes((dparams, dx), (params, x))
    return dparams, None, dx, None, None


apply_with_feedback.defvjp(_fwd, _bwd)


def check_inputs(layer: Any, params: Parameters, inputs: object, injected: bool) -> jax.Array:
    """The inputs of a layer, as an array.

    Args:
        layer: a layer with a feedback kernel.
        params: its parameters.
        inputs: what it was called with.
        injected: whether the layer was given an operation of the user's own.

    Raises:
        ValueError: it was: nothing is known of the backward of that operation; or kernel, feedback
            and bias have shapes that do not belong together.
        TypeError: the inputs are no real floating array, or the dtype of the layer is none of one.
    """
    name, shape = type(layer).__name__, params["kernel"].shape
    if shape != layer.feedback.shape or not has_own_bias(layer, params, shape[-1:]):
        shapes = {key: p.shape for key, p in params.items()} | {"feedback": layer.feedback.shape}
        raise ValueError(
            f"{name}: of {shapes} the feedback has to have the shape of the kernel, and the bias "
            f"that of its last axis, with use_bias={layer.use_bias}: replace them together"
        )
    if layer.dtype is not None and not is_supported_dtype(layer.dtype):
        raise TypeError(f"{name}: dtype={layer.dtype} is not a real float of 16 bits or more")
    if injected:
        raise ValueError(
            f"{name}: an operation of your own has no feedback; leave out dot_general, "
            "conv_general_dilated and promote_dtype"
        )
    x = as_array(inputs)
    if not is_supported_float(x):
        came = getattr(x, "dtype", type(x).__name__)
        raise TypeError(
            f"{name}: inputs of {came} have no gradient to feed back; write "
            "inputs.astype(jnp.float32)"
        )
    return x
