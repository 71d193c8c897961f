"""Signs of weights, scaled by the mean magnitude of each output channel.

    forward   y  = a sign(w),  a = mean |w| over the n weights of a channel
    backward  MagnitudeAwareSign  dw = a g where |w| <= clip_value              arXiv:1808.00278
              XNORSign            dw = g (1 / n + a where |w| <= clip_value)    arXiv:1603.05279
    kept      a mask of one byte an element, and a

For MagnitudeAwareSign a is a constant. XNORSign differentiates it as XNOR-Net does: as if each
weight's own magnitude, a share 1 / n of the mean, scaled its own sign alone. The bound is
inclusive, 0 has the sign 1, and a is computed in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.estimators.rounding.sign import sign
from flax_customgrad.estimators.rounding.step import Step, keep_within
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_positive


def _scaled_sign(w: jax.Array, a: jax.Array, *rest: Any) -> jax.Array:
    return a * sign(w)


def _keep_mask_and_scale(w: jax.Array, a: jax.Array, clip_value: float, *n: int) -> tuple[Any, ...]:
    return *keep_within(w, clip_value), a, *n


def _magnitude_aware_backward(g: jax.Array, mask: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.where(mask, a * g, 0)


def _xnor_backward(g: jax.Array, mask: jax.Array, a: jax.Array, n: jax.Array) -> jax.Array:
    return g * (1 / n + jnp.where(mask, a, 0))


_MAGNITUDE_AWARE_SIGN = Step(
    "MagnitudeAwareSign", _scaled_sign, _magnitude_aware_backward, _keep_mask_and_scale
)
_XNOR_SIGN = Step("XNORSign", _scaled_sign, _xnor_backward, _keep_mask_and_scale)


class MagnitudeAwareSign(nnx.Module):
    """The sign of weights times the mean magnitude of their channel; Bi-Real Net.

    Args:
        clip_value: the gradient passes where |w| <= clip_value.
        channel_axis: the axis of the output channels; the last one in a kernel of flax.nnx.

    Raises:
        ValueError: clip_value is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> w = jnp.array([[0.5, -2.0], [-0.25, 0.0]])
        >>> fcg.MagnitudeAwareSign()(w)
        Array([[ 0.375, -1.   ],
               [-0.375,  1.   ]], dtype=float32)
        >>> jax.grad(lambda w: fcg.MagnitudeAwareSign()(w).sum())(w)
        Array([[0.375, 0.   ],
               [0.375, 1.   ]], dtype=float32)

    Source: arXiv:1808.00278
    """

    def __init__(self, clip_value: float = 1.0, channel_axis: int = -1):
        self.clip_value = check_positive("MagnitudeAwareSign", "clip_value", clip_value)
        self.channel_axis = channel_axis

    def __call__(self, w: jax.Array) -> jax.Array:
        """Binarizes weights.

        Args:
            w: array of any shape with at least one axis, float.

        Returns:
            Array like w.

        Raises:
            ValueError: w has no axis `channel_axis`.
        """
        a, _ = _mean_magnitude("MagnitudeAwareSign", w, self.channel_axis)
        return _MAGNITUDE_AWARE_SIGN(w, a, self.clip_value)


class XNORSign(nnx.Module):
    """The sign of weights times the mean magnitude of their channel; XNOR-Net.

    Args:
        clip_value: the gradient of the sign passes where |w| <= clip_value.
        channel_axis: the axis of the output channels; the last one in a kernel of flax.nnx.

    Raises:
        ValueError: clip_value is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> w = jnp.array([[0.5, -2.0], [-0.25, 0.0]])
        >>> jax.grad(lambda w: fcg.XNORSign()(w).sum())(w)
        Array([[0.875, 0.5  ],
               [0.875, 1.5  ]], dtype=float32)

    Source: arXiv:1603.05279
    """

    def __init__(self, clip_value: float = 1.0, channel_axis: int = -1):
        self.clip_value = check_positive("XNORSign", "clip_value", clip_value)
        self.channel_axis = channel_axis

    def __call__(self, w: jax.Array) -> jax.Array:
        """Binarizes weights.

        Args:
            w: array of any shape with at least one axis, float.

        Returns:
            Array like w.

        Raises:
            ValueError: w has no axis `channel_axis`.
        """
        a, n = _mean_magnitude("XNORSign", w, self.channel_axis)
        return _XNOR_SIGN(w, a, self.clip_value, n)


def _mean_magnitude(layer: str, w: jax.Array, channel_axis: int) -> tuple[jax.Array, int]:
    """The mean of |w| over all axes but one, float32 or wider, and the number of weights in it."""
    if not -w.ndim <= channel_axis < w.ndim:
        raise ValueError(
            f"{layer}: channel_axis={channel_axis} is no axis of weights of shape {w.shape}"
        )
    axes = tuple(axis for axis in range(w.ndim) if axis != channel_axis % w.ndim)
    wide = lax.stop_gradient(w).astype(accumulator(w))
    return jnp.mean(jnp.abs(wide), axes, keepdims=True), w.size // max(w.shape[channel_axis], 1)
