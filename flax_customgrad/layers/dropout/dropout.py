"""Dropout: elements set to 0 at random, the others divided by the probability of staying.

    forward   mask = bernoulli(key, keep),  keep = 1 - rate     one number along broadcast_dims
              y    = x / keep  where mask, else 0
    backward  dx   = g / keep  where mask, else 0
    kept      the mask, a byte an element ("mask") or a bit ("bits"); or the key ("key"), from which
              the backward draws the mask again

The mask does not depend on x, so that y is linear in x, with the slope 1 / keep where it is True.

The mask and the use of random streams are those of flax.nnx, to the bit. The rate is a constant to
every derivative.

Source: https://jmlr.org/papers/v15/srivastava14a.html
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import given
from flax_customgrad.numerics.argument_checks import check_word, integers
from flax_customgrad.numerics.dtypes import (
    as_array,
    in_dtype,
    is_python_number,
    takes_custom_backward,
)
from flax_customgrad.numerics.packing import pack_mask, unpack_mask
from flax_customgrad.numerics.sharding import varying_like

DropoutResidual = Literal["mask", "bits", "key"]
"""What the backward keeps.

"mask" is a byte an element, as nnx keeps, at its speed. "bits" is an eighth of that; packing takes
less than a tenth of the time of drawing. "key" costs no memory, and in a backward that runs apart
from its forward, as that of layers in a `lax.scan`, the time to draw the mask a second time: on a
CPU twice the time of the layer.
"""

_RESIDUALS = ("mask", "bits", "key")


@dataclass(frozen=True)
class DropoutConfig:
    """The choices of dropout that are not arrays.

    Attributes:
        broadcast_dims: the axes along which all elements share one random number.
        residual: what the backward keeps.
    """

    broadcast_dims: tuple[int, ...] = ()
    residual: DropoutResidual = "mask"


class Residuals(NamedTuple):
    """What the backward of `drop` keeps: the key, or the mask as bits or as it is."""

    key_or_mask: jax.Array
    rate: Any
    config: DropoutConfig


@custom_vjp
def drop(x: jax.Array, key: jax.Array, rate: Any, config: DropoutConfig) -> jax.Array:
    """Sets elements to 0 at random, and divides the others by the probability of staying.

    Args:
        x: array of any shape, float.
        key: the key that the mask is drawn from.
        rate: the probability of 0; a number, or an array that broadcasts against x, float.
        config: the axes that share random numbers, and what is kept.

    Returns:
        Array like x.
    """
    return _scaled_where(_mask(key, rate, x, config), x, rate)


def _fwd(
    x: jax.Array, key: jax.Array, rate: Any, config: DropoutConfig
) -> tuple[jax.Array, Residuals]:
    mask = _mask(key, rate, x, config)
    kept = {"bits": pack_mask, "mask": lambda mask: mask, "key": lambda _: key}[config.residual]
    return _scaled_where(mask, x, rate), Residuals(kept(mask), rate, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    kept, rate, config = res
    if config.residual == "key":
        mask = _mask(kept, rate, g, config)
    else:
        mask = unpack_mask(kept, _mask_shape(g, config)[-1] if g.ndim else 1)
    chex.assert_is_broadcastable(mask.shape, g.shape)
    dx = _scaled_where(mask, g, rate)
    chex.assert_equal_shape([dx, g])
    return dx, None, None, None


drop.defvjp(_fwd, _bwd)


def _mask_shape(x: jax.Array, config: DropoutConfig) -> tuple[int, ...]:
    """The shape of the mask of an array: 1 along the axes that share random numbers."""
    shape = list(x.shape)
    for axis in config.broadcast_dims:
        shape[axis] = 1
    return tuple(shape)


def _mask(key: jax.Array, rate: Any, x: jax.Array, config: DropoutConfig) -> jax.Array:
    """Draws which elements of an array stay."""
    keep, shape = 1.0 - _constant(rate), _mask_shape(x, config)
    return jax.random.bernoulli(key, keep, shape, out_sharding=jax.typeof(x).sharding)


def _scaled_where(mask: jax.Array, x: jax.Array, rate: Any) -> jax.Array:
    keep = 1.0 - _constant(rate)
    if not is_python_number(keep):
        keep = jnp.where(keep > 0, keep, 1)  # Nothing stays, and 0 / 0 would be NaN.
    mask = varying_like(jnp.broadcast_to(mask, x.shape), x)
    # With jnp.where XLA on a CPU holds one array more between layers.
    return lax.select(mask, in_dtype(x / keep, x.dtype), jnp.zeros_like(x))


def _constant(rate: Any) -> Any:
    return rate if is_python_number(rate) else lax.stop_gradient(rate)


def dropout(
    x: ArrayLike,
    key: jax.Array,
    rate: ArrayLike,
    *,
    broadcast_dims: int | Sequence[int] = (),
    residual: DropoutResidual = "mask",
) -> jax.Array:
    """Sets elements to 0 at random, and divides the others by the probability of staying.

    Args:
        x: array of any shape, float.
        key: the key that decides which elements become 0.
        rate: the probability of 0, from 0 to 1: a number, or an array that broadcasts against x,
            which may be traced, so that a schedule compiles once. It has no gradient.
        broadcast_dims: the axes along which all elements share one random number.
        residual: what the backward keeps: "mask", a byte an element; "bits", a bit; "key", nothing
            but the key, for the time to draw again where the backward runs apart from its forward.

    Returns:
        Array like x.

    Raises:
        ValueError: the rate is a number that is not from 0 to 1, or `residual` is another word.
        TypeError: x is not a real floating array.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.dropout(jnp.ones(5), jax.random.key(1), 0.5).tolist()
        [2.0, 0.0, 2.0, 2.0, 0.0]
    """
    check_word("dropout", "residual", residual, _RESIDUALS)
    x = jnp.asarray(as_array(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"dropout: x is {x.dtype}; expected real floating numbers")
    if not isinstance(rate, int | float):
        rate = jnp.asarray(as_array(rate))
    elif not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate={rate!r} must be from 0 to 1")
    elif rate in (0, 1):
        return x if rate == 0 else jnp.zeros_like(x)
    return drop(x, key, rate, DropoutConfig(integers(broadcast_dims), residual))


class Dropout(nnx.Dropout):
    """`nnx.Dropout` that may keep a bit an element instead of a byte, or nothing but its key.

    Takes what `flax.nnx.Dropout` takes, and `residual`. Masks, and how random streams advance, are
    those of `flax.nnx.Dropout` to the bit. A rate that is traced, which nnx refuses, is used as it
    is. For integer and complex inputs the layer computes as nnx does.

    Args:
        residual: what the backward keeps: "mask", a byte an element as nnx; "bits", a bit, for up
            to a tenth of the time; "key", which costs no memory and, where the backward runs apart
            from its forward, as in a `lax.scan`, the time to draw the mask again: on a CPU twice
            the time of the layer.

    Raises:
        ValueError: `residual` is another word.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> nnx.view(layer, deterministic=True)(jnp.ones(3))
        Array([1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        residual: DropoutResidual = "mask",
    ):
        super().__init__(
            rate,
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )
        check_word("Dropout", "residual", residual, _RESIDUALS)
        if residual != "mask":  # A layer of the default holds nothing that nnx's does not.
            self.residual = residual

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Sets elements to 0 at random.

        Args:
            inputs: array of any shape.
            deterministic: whether the inputs are returned as they are; None for the layer's own.
            rngs: what a key is drawn from, or a key; None for the layer's own stream.

        Returns:
            Array like `inputs`.

        Raises:
            ValueError: there is neither `deterministic` nor `rngs`, here or in the layer.
        """
        is_off = self.deterministic if deterministic is None else deterministic
        source = self.rngs if rngs is None else rngs
        x = as_array(inputs)
        if (
            is_off is None
            or is_off
            or (not is_traced(self.rate) and self.rate in (0, 1))
            or not isinstance(source, nnx.Rngs | nnx.RngStream | jax.Array)
            or not takes_custom_backward(x)
        ):
            return super().__call__(inputs, **given(deterministic=deterministic, rngs=rngs))
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        key = source() if isinstance(source, nnx.RngStream) else source
        config = DropoutConfig(integers(self.broadcast_dims), getattr(self, "residual", "mask"))
        return drop(x, key, self.rate, config)
