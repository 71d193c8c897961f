"""Feedback alignment: a layer that sends its error back through another kernel than its own.

    forward   y  = f(W, b, x)
    backward  dx = that of f with the fixed kernel B in place of W
              dW, db = those of f
    kept      x, W, b and B, as they came

f is linear in its kernel, so dW does not depend on W: the whole backward is that of f at B. Nothing
uses the forward that `jax.vjp` repeats there, and XLA drops it. W comes to align with B over
training, and dx with the true gradient. arXiv:1411.0247.
"""

from typing import NamedTuple

import jax
from flax import nnx

from flax_customgrad.contract.custom_vjp import CustomVJP, custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.numerics.dtypes import as_array, is_supported_float


class Residuals(NamedTuple):
    """What the backward of `aligned` keeps: only what the caller holds anyway."""

    params: Parameters
    feedback: jax.Array
    x: jax.Array
    f: CustomVJP
    how: object


@custom_vjp(surrogate=True)
def aligned(
    params: Parameters, feedback: jax.Array, x: jax.Array, f: CustomVJP, how: object
) -> jax.Array:
    """Applies f.

    Args:
        params: `kernel`, and `bias` or none.
        feedback: B, of the shape of the kernel, float.
        x: inputs, float.
        f: `linear` or `convolution`, a function of (params, x, how) that is linear in the kernel.
        how: its choices that are not arrays.

    Returns:
        What f returns.
    """
    return f(params, x, how)


def _fwd(
    params: Parameters, feedback: jax.Array, x: jax.Array, f: CustomVJP, how: object
) -> tuple[jax.Array, Residuals]:
    return aligned(params, feedback, x, f, how), Residuals(params, feedback, x, f, how)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, None, jax.Array, None, None]:
    dtype = res.params["kernel"].dtype
    at_feedback = nnx.State({**res.params, "kernel": res.feedback.astype(dtype)})
    _, pull = jax.vjp(lambda params, x: res.f(params, x, res.how), at_feedback, res.x)
    dparams, dx = pull(g)
    return dparams, None, dx, None, None


aligned.defvjp(_fwd, _bwd)


def checked_inputs(layer: nnx.Module, inputs: object, injected: bool) -> jax.Array:
    """The inputs of a layer, as an array.

    Args:
        layer: a layer with a feedback kernel.
        inputs: what it was called with.
        injected: whether the layer was given an operation of the user's own.

    Raises:
        ValueError: it was: nothing is known of the backward of that operation.
        TypeError: the inputs are no real floating array.
    """
    name = type(layer).__name__
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
