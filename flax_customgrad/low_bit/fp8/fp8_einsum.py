"""Fp8Einsum: an einsum in 8-bit floats, arXiv:2209.05433.

Written for 'nta,hab->nthb'; q(x) are the codes of x for a scale s, q(g) are E5M2:

    forward   y[n,t,h,b]  = s_x s_W sum_a q(x)[n,t,a] q(W)[h,a,b] + c[h,b]
    backward  dx[n,t,a]   = s_g s_W sum_hb q(g)[n,t,h,b] q(W)[h,a,b]
              dW[h,a,b]   = s_x s_g sum_nt q(x)[n,t,a] q(g)[n,t,h,b]
              dc[h,b]     = sum_nt g[n,t,h,b]
    kept      q(x), one byte an element, and scales
"""

from typing import Any

import jax
from flax import nnx
from flax.typing import Shape

from flax_customgrad.layers.linear.einsum import Einsum, einsum
from flax_customgrad.layers.replaced_matmul import adopt, operands
from flax_customgrad.low_bit.fp8.fp8_layer import Scaling, product, set_scaling


class Fp8Einsum(Einsum):
    """`Einsum` in 8-bit floats: E4M3 for input and kernel, E5M2 for the gradient.

    Parameters, their names and initial values are those of `flax.nnx.Einsum`; scaling, steps and
    state are those of `Fp8Linear`. Its source is arXiv:2209.05433.

    Attributes:
        scaling: "delayed" or "current".
        margin: how many halvings of a range are left unused.
        delayed: the histories and scales, a `DelayedScaling`; None with current scaling.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Fp8Einsum('nta,hab->nthb', (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
        rngs: nnx.Rngs,
        **einsum: Any,
    ):
        """Makes the layer.

        Args:
            einsum_str: the equation.
            kernel_shape: shape of the kernel.
            bias_shape: shape of the bias; None for no bias.
            scaling: as for `Fp8Linear`.
            history: as for `Fp8Linear`.
            margin: as for `Fp8Linear`.
            rngs: random numbers for the parameters.
            **einsum: what else `nnx.Einsum` takes, but no `einsum_op` or `promote_dtype`.

        Raises:
            ValueError: an argument is out of its range, or an operation is injected.
        """
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, **einsum)
        set_scaling(self, scaling, history, margin)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Einsum,
        *,
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
    ) -> "Fp8Einsum":
        """Turns an einsum layer into one of this class, in place.

        Args:
            layer: an `nnx.Einsum` or a subclass.
            scaling: as for `Fp8Linear`.
            history: as for `Fp8Linear`.
            margin: as for `Fp8Linear`.

        Raises:
            TypeError: it is another layer.
            ValueError: an argument is out of its range, or an operation is injected.
        """
        fp8 = adopt(cls, layer, nnx.Einsum)
        set_scaling(fp8, scaling, history, margin)
        return fp8

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array with an axis per label of the first operand.
            einsum_str: an equation that goes before that of the constructor, or None.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array with an axis per label behind the arrow.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: there is no equation, it does not fit inputs and kernel, or it repeats a
                label within an operand or broadcasts an axis of size 1.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        kernel = params["kernel"]
        equation = self._regular_equation(einsum_str, x, kernel)
        sizes = dict(zip(equation.kernel, kernel.shape, strict=True))
        return product(
            self,
            params,
            x,
            einsum,
            equation,
            out_sharding=out_sharding,
            bias_shape=tuple(sizes.get(label, 1) for label in equation.y),
        )
