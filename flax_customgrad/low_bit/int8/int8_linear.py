"""Int8Linear: a linear layer that multiplies in int8; the mathematics is in `int8_product`."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.replaced_matmul import adopt, checked, refuse_injected
from flax_customgrad.low_bit.int8.int8_layer import (
    ActivationScale,
    Backward,
    InInt8,
    Residuals,
    WeightScale,
    checked_rounding,
)
from flax_customgrad.low_bit.int8.int8_product import int8_product
from flax_customgrad.low_bit.int8.int32_sums import summed
from flax_customgrad.numerics import products
from flax_customgrad.numerics.products import MatmulConfig


@dataclass(frozen=True)
class Rows:
    """Rows times a kernel, a `Map`.

    Attributes:
        arithmetic: dtype, precision and sharding.
    """

    arithmetic: MatmulConfig

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """X times the kernel, in float."""
        return linear(params, x, self.arithmetic)

    def row(self, ndim: int) -> tuple[int, ...]:
        """The last axis."""
        return (ndim - 1,)

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """y[..., o] = sum_i x[..., i] w[i, o]."""
        numbers = (((x.ndim - 1,), (0,)), ((), ()))

        def multiply(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
            sharding = self.arithmetic.out_sharding
            return lax.dot_general(
                x, w, numbers, preferred_element_type=dtype, out_sharding=sharding
            )

        return summed(multiply, x, w, terms=w.shape[0], wide=wide)

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """dx[..., i] = sum_o g[..., o] w[i, o]."""
        numbers = (((g.ndim - 1,), (1,)), ((), ()))

        def multiply(dtype: Any, g: jax.Array, w: jax.Array) -> jax.Array:
            return products.product(g, w, numbers, dtype, like=x)

        return summed(multiply, g, w, terms=w.shape[1], wide=wide)

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """dw[i, o] = sum_... x[..., i] g[..., o]."""
        rows = tuple(range(g.ndim - 1))

        def multiply(dtype: Any, x: jax.Array, g: jax.Array) -> jax.Array:
            return products.product(x, g, ((rows, rows), ((), ())), dtype, like=w)

        # XLA on a CPU takes 2 to 6 times as long for int8 whose first axes meet.
        terms = math.prod(g.shape[:-1])
        return summed(multiply, x, g, terms=terms, wide=wide, in_float_on=("cpu",))


class Int8Linear(Linear, InInt8):
    """`Linear` that multiplies in int8 and adds up in int32.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is float. Kernel and input are rounded to int8 in each call: no calibration, no state.
    A CPU multiplies the codes of the kernel's gradient as float32, which is faster there.
    Its sources are arXiv:2105.03536 (backward="int8") and arXiv:2304.13013 ("switchback").

    Attributes:
        rounding: what is rounded, and with which scales.
        noise: the stream that stochastic rounding draws from, or None.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int8Linear(16, 3, backward="int8", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((8, 16))).shape
        (8, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        backward: Backward = "float",
        residuals: Residuals | None = None,
        activation_scale: ActivationScale = "per_row",
        weight_scale: WeightScale | None = None,
        stochastic_rounding: bool = False,
        rng_collection: str = "noise",
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            backward: "float" multiplies gradients as floats. "int8" rounds the cotangent twice and
                computes the gradients of input and kernel in int8. "switchback" does so for the
                input alone, and computes the kernel's from the input as it came.
            residuals: "quantized" keeps int8 codes of the input, and computes gradients with the
                rounded operands; "original" keeps the input, and computes those of
                backward="float" with the operands as they came. By default the former, and the
                latter for backward="switchback", for which there is no other; "int8" has the
                former only.
            activation_scale: "per_row": each row of the inputs, a token, has a scale;
                "per_tensor": they share one.
            weight_scale: "per_channel": each output feature has a scale; "per_tensor": they share
                one. By default the former, and the latter for backward="switchback".
            stochastic_rounding: whether cotangents are rounded up or down at random, so that
                gradients are right on average, instead of to the nearest.
            rng_collection: the stream of `rngs` to draw from for it.
            rngs: random numbers for the parameters, and for stochastic rounding.
            **linear: what else `nnx.Linear` takes, but no `dot_general` or `promote_dtype`.

        Raises:
            ValueError: an argument is another word, or does not go with the backward; or an
                operation is injected.
        """
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_injected("Int8Linear", self)
        self.rounding, self.noise = checked_rounding(
            "Int8Linear",
            backward=backward,
            residuals=residuals,
            activation_scale=activation_scale,
            weight_scale=weight_scale,
            stochastic_rounding=stochastic_rounding,
            rng_collection=rng_collection,
            rngs=rngs,
        )

    @classmethod
    def from_layer(cls, layer: nnx.Linear, **rounding: Any) -> "Int8Linear":
        """Turns a linear layer into one that multiplies in int8, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            **rounding: `backward` and what comes after it in the constructor; `rngs` for
                stochastic rounding alone.

        Raises:
            TypeError: it is another layer.
            ValueError: an operation is injected, or an argument is as for the constructor.
        """
        int8 = adopt(cls, layer, nnx.Linear)
        int8.rounding, int8.noise = checked_rounding("Int8Linear", **rounding)
        return int8

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
        """
        params, x = checked(self, self._parameters(), inputs)
        key = None if self.noise is None else self.noise()
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return int8_product(params, x, self._packed, key, Rows(how), self.rounding)
