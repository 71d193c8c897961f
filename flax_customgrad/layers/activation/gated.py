"""Gated units: the product of one array with an activation of the other.

    forward   y     = f(gate) up
    backward  dgate = g up f'(gate)
              dup   = g f(gate)
    kept      gate and up

Autodiff keeps both, f(gate) and what f keeps: 5 arrays for SwiGLU, 7 for GeGLU. The activation is
computed again in the backward, in float32 as in the forward.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.piecewise import RELU_OF_INPUT
from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.layers.activation.smooth import GELU_ERF, GELU_TANH, SILU
from flax_customgrad.numerics.dtypes import as_array, takes_custom_backward
from flax_customgrad.numerics.elementwise import Elementwise, elementwise, in_float32


@dataclass(frozen=True)
class Gated(Elementwise):
    """The product with an activation, of (gate, up); called by the name of a public function.

    Attributes:
        f: the activation of the gate; one that keeps its input.
    """

    f: Pointwise

    def __call__(self, name: str, gate: Any, up: Any) -> jax.Array:
        """Applies the product.

        Args:
            name: of the function, for the error.
            gate: array of any shape.
            up: array of that shape.

        Raises:
            ValueError: the shapes differ.
        """
        gate, up = as_array(gate), as_array(up)
        if jnp.shape(gate) != jnp.shape(up):
            raise ValueError(
                f"{name}: gate has shape {jnp.shape(gate)} and up {jnp.shape(up)}; the product is "
                "taken element by element, so both need the same shape"
            )
        if not takes_custom_backward(gate, up):
            return self.f.reference(gate) * up
        return elementwise(gate, (up,), self)

    def primal(self, gate: jax.Array, *up: jax.Array) -> jax.Array:
        """f(gate) up, in the dtype to which both promote."""
        return in_float32(self._product, jnp.result_type(gate, *up), gate, *up)

    def residuals(self, gate: jax.Array, y: jax.Array, *up: jax.Array) -> tuple[jax.Array, ...]:
        """Gate and up."""
        return gate, *up

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of gate and up."""
        gate, up = kept
        dgate = self.f.backward(g * up, gate)
        dup = g * self.f.forward(gate)
        return dgate, dup

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return self.f.forward(gate) * up


_SWIGLU, _GEGLU_TANH, _GEGLU_ERF, _REGLU = map(Gated, (SILU, GELU_TANH, GELU_ERF, RELU_OF_INPUT))


def swiglu(gate: ArrayLike, up: ArrayLike) -> jax.Array:
    """The product silu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.

    Returns:
        Array of that shape, in the dtype to which both promote.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.swiglu(jnp.ones((2, 3)), jnp.ones((2, 3))).shape
        (2, 3)

    Source: arXiv:2002.05202
    """
    return _SWIGLU("swiglu", gate, up)


def geglu(gate: ArrayLike, up: ArrayLike, approximate: bool = True) -> jax.Array:
    """The product gelu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.
        approximate: as for `gelu`.

    Returns:
        Array of that shape, in the dtype to which both promote.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.geglu(jnp.ones((2, 3)), jnp.ones((2, 3))).shape
        (2, 3)

    Source: arXiv:2002.05202
    """
    return (_GEGLU_TANH if approximate else _GEGLU_ERF)("geglu", gate, up)


def reglu(gate: ArrayLike, up: ArrayLike) -> jax.Array:
    """The product relu(gate) up.

    Args:
        gate: array of any shape.
        up: array of that shape.

    Returns:
        Array of that shape, in the dtype to which both promote.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.reglu(jnp.ones((2, 3)), jnp.ones((2, 3))).shape
        (2, 3)

    Source: arXiv:2002.05202
    """
    return _REGLU("reglu", gate, up)
