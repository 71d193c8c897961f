"""Few-bit activations: the exact function, with a derivative of a few steps.

    forward   y  = f(x)
    backward  dx = g s(x),  s(x) = level[k] for x >= 0, and 1 - level[k] for x < 0
              where |x| lies between border[k - 1] and border[k]
    kept      the step that x lies on: 1, 2 or 4 bits per element

`f'(x) + f'(-x) = 1` for gelu and for silu, so half a table is enough. Among all functions of
`2^bits` steps, s is the one with the least `integral of (f'(x) - s(x))^2 dx` from -10 to 10. There
each level is the mean of `f'` over its step, and each border lies where `f'` is halfway between
the levels beside it.

Where `f'` itself needs x, 16 or 32 bits per element, these are a quarter to a thirty-second of it.
The gradient is biased, by the error of s: it is a surrogate.

Source: arXiv:2202.00441
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.layers.activation.smooth import GELU_ERF, GELU_TANH, SILU
from flax_customgrad.numerics.dtypes import as_array, is_supported_float
from flax_customgrad.numerics.elementwise import Elementwise, elementwise_surrogate
from flax_customgrad.numerics.packing import is_packable, pack_bits, unpack_bits


@dataclass(frozen=True)
class HalfTable:
    """The steps of a derivative for x >= 0.

    Attributes:
        borders: where one step ends and the next begins, ascending.
        levels: the value of each step, one more than there are borders.
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]


_ONE_STEP = HalfTable((), (1.0,))

GELU_TABLES: Mapping[int, HalfTable] = {
    1: _ONE_STEP,
    2: HalfTable((0.46903,), (0.68047, 1.01572)),
    4: HalfTable(
        (0.15503, 0.31526, 0.48750, 0.68346, 0.93188, 2.05308, 2.68510),
        (0.56160, 0.68382, 0.80297, 0.91652, 1.02090, 1.10935, 1.04967, 1.00133),
    ),
}
SILU_TABLES: Mapping[int, HalfTable] = {
    1: _ONE_STEP,
    2: HalfTable((0.78928,), (0.68768, 1.02671)),
    4: HalfTable(
        (0.24169, 0.49325, 0.76770, 1.08791, 1.51140, 3.72962, 5.19327),
        (0.56013, 0.67923, 0.79472, 0.90374, 1.00238, 1.08373, 1.04013, 1.00587),
    ),
}


@dataclass(frozen=True)
class FewBit(Elementwise):
    """An activation with a derivative of steps; called as `f(x)`.

    Attributes:
        function: the activation.
        table: its steps for x >= 0.
        bits: how many bits tell the steps of both halves apart.
    """

    function: Pointwise
    table: HalfTable
    bits: int

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Applies the activation."""
        x = jnp.asarray(x) if isinstance(x, float) else as_array(x)
        # Integers have no gradient; what nnx refuses, it refuses.
        return elementwise_surrogate(x, (), self) if is_supported_float(x) else self.function(x)

    def primal(self, x: jax.Array, *parameters: Any) -> jax.Array:
        """The activation, in the dtype of x."""
        return self.function.primal(x)

    def residuals(self, x: jax.Array, y: jax.Array, *parameters: Any) -> tuple[jax.Array]:
        """The step that each element lies on, its sign in the lowest bit."""
        step = jnp.zeros(x.shape, jnp.uint8)
        for border in self.table.borders:
            step += (jnp.abs(x) > border).astype(jnp.uint8)
        codes = 2 * step + (x < 0).astype(jnp.uint8)
        packs = is_packable(codes.shape, jax.typeof(codes).sharding)
        return (pack_bits(codes, self.bits) if packs else codes,)

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[jax.Array]:
        """The cotangent of x."""
        (codes,) = kept
        if codes.shape != g.shape:  # A last axis of one element is packed as it is.
            codes = unpack_bits(codes, self.bits, g.shape[-1])
        step, is_negative = codes >> 1, (codes & 1).astype(bool)
        s = jnp.full(g.shape, self.table.levels[0], g.dtype)
        # Sums of steps: a table that is looked up would be a gather, which XLA does not fuse.
        for k, (below, above) in enumerate(pairwise(self.table.levels)):
            s += jnp.where(step > k, above - below, 0.0)
        return (g * jnp.where(is_negative, 1 - s, s),)


def _of_bits(name: str, function: Pointwise, tables: Mapping[int, HalfTable], bits: int) -> FewBit:
    if bits not in tables:
        raise ValueError(
            f"{name}: bits={bits!r}, expected 1, 2 or 4: 3 bits would be stored in 4, and with 8 "
            "or more the exact function is the better choice"
        )
    return FewBit(function, tables[bits], bits)


def few_bit_gelu(x: ArrayLike, bits: int = 2, approximate: bool = True) -> jax.Array:
    """`gelu`, with a derivative of 2, 4 or 16 steps that keeps 1, 2 or 4 bits per element.

    Args:
        x: array of any shape.
        bits: 1, 2 or 4. The derivative is then off by 0.08, 0.045 or 0.013 of a unit, root mean
            square over [-10, 10].
        approximate: whether the function approximates the normal distribution by a tanh. The steps
            are those of the exact function.

    Returns:
        Array like x, `gelu(x, approximate)` to the bit.

    Raises:
        ValueError: `bits` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([-3.0, -0.3, 0.3, 3.0])
        >>> gradient = jax.grad(lambda x: fcg.few_bit_gelu(x).sum())(x)
        >>> [round(float(slope), 3) for slope in gradient]
        [-0.016, 0.32, 0.68, 1.016]

    Source: arXiv:2202.00441
    """
    function = GELU_TANH if approximate else GELU_ERF
    return _of_bits("few_bit_gelu", function, GELU_TABLES, bits)(x)


def few_bit_silu(x: ArrayLike, bits: int = 2) -> jax.Array:
    """`silu`, with a derivative of 2, 4 or 16 steps that keeps 1, 2 or 4 bits per element.

    Args:
        x: array of any shape.
        bits: 1, 2 or 4. The derivative is then off by 0.10, 0.049 or 0.015 of a unit, root mean
            square over [-10, 10].

    Returns:
        Array like x, `silu(x)` to the bit.

    Raises:
        ValueError: `bits` is none of these.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.residual_bytes(fcg.few_bit_silu, jnp.ones(64))
        16

    Source: arXiv:2202.00441
    """
    return _of_bits("few_bit_silu", SILU, SILU_TABLES, bits)(x)
