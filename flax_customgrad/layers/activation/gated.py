"""Gated units: the product of one half with an activation of the other.

    forward   y     = f(gate) up
    backward  dgate = g up f'(gate)
              dup   = g f(gate)
    kept      gate and up; glu keeps the x of which they are the halves

Autodiff keeps both, f(gate) and what f keeps: 5 arrays for SwiGLU, 7 for GeGLU. The activation is
computed again in the backward, in float32 as in the forward. Source: arXiv:1612.08083 (glu) and
arXiv:2002.05202.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.piecewise import RELU_OF_INPUT
from flax_customgrad.layers.activation.pointwise import Pointwise, once
from flax_customgrad.layers.activation.sigmoidal import SIGMOID_OF_INPUT
from flax_customgrad.layers.activation.smooth import GELU_ERF, GELU_TANH, SILU
from flax_customgrad.numerics.dtypes import (
    as_array,
    in_dtype,
    takes_custom_backward,
    widened,
)


class Residuals(NamedTuple):
    """What the backward of `gated` keeps."""

    gate: jax.Array
    up: jax.Array
    f: Pointwise


@custom_vjp
def gated(gate: jax.Array, up: jax.Array, f: Pointwise) -> jax.Array:
    """A product with an activation.

    Args:
        gate: array of any shape, float.
        up: array of that shape, float.
        f: the activation of the gate; one that keeps its input.

    Returns:
        Array of that shape, in the dtype to which both promote.
    """
    return _product(f, gate, up)


def _fwd(gate: jax.Array, up: jax.Array, f: Pointwise) -> tuple[jax.Array, Residuals]:
    return gated(gate, up, f), Residuals(gate, up, f)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return *_cotangents(res.f, g, res.gate, res.up), None


gated.defvjp(_fwd, _bwd)


@once
def _product(f: Pointwise, gate: jax.Array, up: jax.Array) -> jax.Array:
    dtype = jnp.result_type(gate, up)
    gate, up = widened(dtype, gate, up)
    return in_dtype(f.forward(gate) * up, dtype)


@once
def _cotangents(
    f: Pointwise, g: jax.Array, gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, jax.Array]:
    g, gate, up = widened(g.dtype, g, gate, up)
    return f.backward(g * up, gate), g * f.forward(gate)


def _gated(name: str, gate: Any, up: Any, f: Pointwise) -> jax.Array:
    gate, up = as_array(gate), as_array(up)
    if jnp.shape(gate) != jnp.shape(up):
        raise ValueError(
            f"{name}: gate has shape {jnp.shape(gate)} and up {jnp.shape(up)}; the product is "
            "taken element by element, so both need the same shape"
        )
    return gated(gate, up, f) if takes_custom_backward(gate, up) else f.reference(gate) * up


def swiglu(gate: ArrayLike, up: ArrayLike) -> jax.Array:
    """The product silu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.

    Returns:
        Array of that shape, in the dtype to which both promote. Its source is arXiv:2002.05202.

    Raises:
        ValueError: the shapes differ.
    """
    return _gated("swiglu", gate, up, SILU)


def geglu(gate: ArrayLike, up: ArrayLike, approximate: bool = True) -> jax.Array:
    """The product gelu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.
        approximate: as for `gelu`.

    Returns:
        Array of that shape, in the dtype to which both promote. Its source is arXiv:2002.05202.

    Raises:
        ValueError: the shapes differ.
    """
    return _gated("geglu", gate, up, GELU_TANH if approximate else GELU_ERF)


def reglu(gate: ArrayLike, up: ArrayLike) -> jax.Array:
    """The product relu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.

    Returns:
        Array of that shape, in the dtype to which both promote. Its source is arXiv:2002.05202.

    Raises:
        ValueError: the shapes differ.
    """
    return _gated("reglu", gate, up, RELU_OF_INPUT)


@custom_vjp
def _glu(x: jax.Array, axis: int) -> jax.Array:
    up, gate = jnp.split(x, 2, axis)
    return _product(SIGMOID_OF_INPUT, gate, up)


def _glu_fwd(x: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _glu(x, axis), (x, axis)


def _glu_bwd(res: tuple[jax.Array, int], g: jax.Array) -> tuple[jax.Array, None]:
    x, axis = res
    up, gate = jnp.split(x, 2, axis)
    dgate, dup = _cotangents(SIGMOID_OF_INPUT, g, gate, up)
    return jnp.concatenate([dup, dgate], axis), None


_glu.defvjp(_glu_fwd, _glu_bwd)


def glu(x: ArrayLike, axis: int = -1) -> jax.Array:
    """The gated linear unit: the first half of an axis times the sigmoid of the second.

    Args:
        x: array whose axis has an even size.
        axis: the axis to split.

    Returns:
        Array of half that size. Its source is arXiv:1612.08083.

    Raises:
        ValueError: the axis does not exist, or has an odd size.
    """
    x = as_array(x)
    shape = jnp.shape(x)
    if not -len(shape) <= axis < len(shape) or shape[axis] % 2:
        raise ValueError(
            f"glu: axis {axis} of an array of shape {shape} is no axis of even size, which could "
            "be split in two"
        )
    return _glu(x, axis) if takes_custom_backward(x) else jax.nn.glu(x, axis)
