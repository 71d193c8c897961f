"""Fp8Linear: a linear layer that multiplies in 8-bit floats, arXiv:2209.05433.

forward   y  = s_x s_W q(x) q(W) + b               q to E4M3
backward  dx = s_g s_W q(g) q(W)^T                 q(g) to E5M2
dW = s_x s_g q(x)^T q(g),  db = sum g
kept      q(x), one byte an element, and scales
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.replaced_matmul import adopt, operands
from flax_customgrad.low_bit.fp8.fp8_layer import Scaling, product, set_scaling


class Fp8Linear(Linear):
    """`Linear` in 8-bit floats: E4M3 for input and kernel, E5M2 for the gradient.

    Parameters, their names and initial values are those of `flax.nnx.Linear`. The histories and
    scales of delayed scaling, that of the gradient included, are `BackwardState`s: the backward
    pass writes them, and an optimizer need not know of them. A forward alone, as in evaluation,
    writes nothing. Each gradient is one step; where an optimizer steps after several, as in
    gradient accumulation, `begin_step` says where a step begins. Within a step the histories take
    the maximum, also over calls of one layer.

    `backward_state` and `load_backward_state` save and restore them. JAX cannot write them under
    `jax.vmap` of the gradient, in `jax.shard_map` or in a scan over stacked layers, which are
    errors: take `scaling="current"` there.

    Its source is arXiv:2209.05433.

    Attributes:
        scaling: "delayed" or "current".
        margin: how many halvings of a range are left unused.
        delayed: the histories and scales, a `DelayedScaling`; None with current scaling.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Fp8Linear(4, 3, history=2, rngs=nnx.Rngs(0))
        >>> x = jnp.arange(8.).reshape(2, 4)
        >>> grads = nnx.grad(lambda layer, x: 5 * layer(x).sum())(layer, x)
        >>> input_history, _, gradient_history = layer.delayed.amax_history[...]
        >>> input_history, gradient_history
        (Array([7., 0.], dtype=float32), Array([5., 0.], dtype=float32))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            scaling: "delayed" takes scales from the maxima of the last steps, "current" from the
                arrays at hand, which are read once more for it.
            history: how many steps delayed scaling remembers.
            margin: how many halvings of a range are left unused, so that what grows by 2^margin
                from one step to the next is not clipped.
            rngs: random numbers for the parameters.
            **linear: what else `nnx.Linear` takes, but no `dot_general` or `promote_dtype`.

        Raises:
            ValueError: an argument is out of its range, or an operation is injected.
        """
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        set_scaling(self, scaling, history, margin)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
    ) -> "Fp8Linear":
        """Turns a linear layer into one of this class, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            scaling: as for the constructor.
            history: as for the constructor.
            margin: as for the constructor.

        Raises:
            TypeError: it is another layer.
            ValueError: an argument is out of its range, or an operation is injected.
        """
        fp8 = adopt(cls, layer, nnx.Linear)
        set_scaling(fp8, scaling, history, margin)
        return fp8

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `preferred_element_type`, `dtype` or the
            promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        bias_shape = (*(1,) * (x.ndim - 1), self.out_features)
        return product(self, params, x, linear, out_sharding=out_sharding, bias_shape=bias_shape)
