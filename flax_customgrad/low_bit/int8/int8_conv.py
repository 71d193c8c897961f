"""Int8Conv: a convolution that multiplies in int8; the mathematics is in `int8_product`.

A row is an image. Windows overlap, so that a scale for each place in it would stand inside of the
sums: a scale is of an image, or of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.conv.choose_lowering import correlate, correlate_gradients
from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    parameters_with_mask_applied,
    with_one_batch_axis,
)
from flax_customgrad.layers.conv.convolution import ConvConfig, convolution
from flax_customgrad.layers.conv.geometry import Geometry, mirror_kernel
from flax_customgrad.layers.conv.lowerings.xla_convolution import xla_correlate
from flax_customgrad.layers.drop_in import Parameters
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
from flax_customgrad.low_bit.int8.int32_sums import is_exact, summed
from flax_customgrad.numerics.products import MatmulConfig

_FEW = 4  # features: XLA's convolution of fewer int8 is slower than that of floats


@dataclass(frozen=True)
class Images:
    """Images by a kernel, a `Map`.

    Attributes:
        how: where the windows lie, and dtype, precision and sharding.
    """

    how: ConvConfig

    @property
    def arithmetic(self) -> MatmulConfig:
        """dtype, precision and sharding."""
        return self.how.matmul

    def __call__(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The convolution of floats."""
        return convolution(params, x, self.how)

    def row(self, ndim: int) -> range:
        """All axes but the first."""
        return range(1, ndim)

    def output(self, x: jax.Array, w: jax.Array, wide: Any) -> jax.Array:
        """The convolution."""
        return _correlate(self._surrounded(x), w, self.how.geometry, wide, self.how.matmul)

    def input_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The convolution of g with the mirrored kernel."""
        geometry = self.how.geometry
        w = mirror_kernel(w, geometry.groups)
        there = replace(self.how.matmul, out_sharding=None)
        dx = _correlate(g, w, geometry.transposed, wide, there)
        around = self.how.boundary
        return dx if around is None else around.transpose(dx, x.astype(wide))

    def kernel_gradient(self, x: jax.Array, w: jax.Array, g: jax.Array, wide: Any) -> jax.Array:
        """The sums over images and places, in float: XLA has no fast convolution of int8 for it."""
        x, w, g = (a.astype(wide) for a in (self._surrounded(x), w, g))
        return correlate_gradients(x, w, g, self.how.geometry, self.how.matmul.precision)[1]

    def _surrounded(self, x: jax.Array) -> jax.Array:
        return x if self.how.boundary is None else self.how.boundary.apply(x)


def _correlate(
    x: jax.Array, w: jax.Array, geometry: Geometry, wide: Any, how: MatmulConfig
) -> jax.Array:
    """A convolution of codes: in int8 where all of several features meet, else in float."""

    def multiply(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
        if dtype == jnp.int32:
            return xla_correlate(
                x, w, geometry, preferred_element_type=dtype, out_sharding=how.out_sharding
            )
        return correlate(x, w, geometry, dtype, how.precision, how.out_sharding)

    terms = _met(geometry) * geometry.in_features // geometry.groups
    dense = geometry.groups == 1 and all(d == 1 for d in geometry.input_dilation)
    if is_exact(terms, wide) and not (dense and geometry.in_features >= _FEW):
        return multiply(wide, x.astype(wide), w.astype(wide))
    # XLA has few convolutions of int8 on a GPU, https://github.com/jax-ml/jax/issues/7637.
    return summed(multiply, x, w, terms=terms, wide=wide, in_float_on=("cuda", "rocm"))


def _met(geometry: Geometry) -> int:
    """How many places of the input a window meets, and not the zeros that spread it out."""
    axes = zip(geometry.window, geometry.kernel_dilation, geometry.input_dilation, strict=True)
    return math.prod(-(-n // (spread // math.gcd(spread, step))) for n, step, spread in axes)


class Int8Conv(Conv, InInt8):
    """`Conv` that multiplies in int8 and adds up in int32.

    Parameters, their names and initial values are those of `flax.nnx.Conv`; the kernel that is
    trained is float. Kernel and images are rounded to int8 in each call: no calibration, no state.
    Strides, dilations, groups, paddings and masks are those of `Conv`. Grouped and depthwise
    convolutions, those of fewer than 4 features or of a spread input, the gradients of kernels, and
    everything on a GPU multiply the codes as floats: that is faster and, up to 1040 products a sum,
    as exact.

    Attributes:
        rounding: what is rounded, and with which scales.
        noise: the stream that stochastic rounding draws from, or None.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int8Conv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        backward: Backward = "float",
        residuals: Residuals | None = None,
        activation_scale: ActivationScale = "per_row",
        weight_scale: WeightScale | None = None,
        stochastic_rounding: bool = False,
        rng_collection: str = "noise",
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        """Makes the layer.

        Args:
            in_features: number of input features.
            out_features: number of output features.
            kernel_size: shape of the window, an int for one axis of space.
            *args: further arguments of `nnx.Conv`.
            backward: as for `Int8Linear`.
            residuals: as for `Int8Linear`.
            activation_scale: "per_row": each image has a scale; "per_tensor": they share one.
            weight_scale: as for `Int8Linear`.
            stochastic_rounding: as for `Int8Linear`.
            rng_collection: as for `Int8Linear`.
            rngs: random numbers for the parameters, and for stochastic rounding.
            **conv: further keywords of `nnx.Conv`, but no `conv_general_dilated` or
                `promote_dtype`.

        Raises:
            ValueError: an argument is another word, or does not go with the backward; or an
                operation is injected.
        """
        super().__init__(in_features, out_features, kernel_size, *args, rngs=rngs, **conv)
        refuse_injected("Int8Conv", self)
        self.rounding, self.noise = checked_rounding(
            "Int8Conv",
            backward=backward,
            residuals=residuals,
            activation_scale=activation_scale,
            weight_scale=weight_scale,
            stochastic_rounding=stochastic_rounding,
            rng_collection=rng_collection,
            rngs=rngs,
        )

    @classmethod
    def from_layer(cls, layer: nnx.Conv, **rounding: Any) -> "Int8Conv":
        """Turns a convolution into one that multiplies in int8, in place.

        Args:
            layer: an `nnx.Conv` or a subclass.
            **rounding: `backward` and what comes after it in the constructor; `rngs` for
                stochastic rounding alone.

        Raises:
            TypeError: it is another layer.
            ValueError: an operation is injected, or an argument is as for the constructor.
        """
        int8 = adopt(cls, layer, nnx.Conv)
        int8.rounding, int8.noise = checked_rounding("Int8Conv", **rounding)
        return int8

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (*batch, *size, in_features), float, with any number of batch
                axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: as for `Conv`.
        """
        params, images = checked(self, self._parameters(), inputs)
        check_conv_inputs(self, images, self.in_features)
        packed, key = self._packed, None if self.noise is None else self.noise()
        of = Images(self._config(images, out_sharding))

        def run(x: jax.Array) -> jax.Array:
            return int8_product(params, x, packed, key, of, self.rounding)

        return with_one_batch_axis(run, images, len(self.kernel_size))

    def _parameters(self) -> Parameters:
        return parameters_with_mask_applied(self)
