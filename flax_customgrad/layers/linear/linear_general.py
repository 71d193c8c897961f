"""LinearGeneral: a product over several axes of the input, with batch axes, and a bias.

With `B` the batch axes, `F` the free axes of x, `I` its contracted axes and `O` the new axes of y:

    forward   y[B, F, O]       = sum_I x[B, F, I] kernel[B, I, O] + bias[B, O]
    backward  dx[B, F, I]      = sum_O g[B, F, O] kernel[B, I, O]
              dkernel[B, I, O] = sum_F x[B, F, I] g[B, F, O]
              dbias[B, O]      = sum_F g[B, F, O]
    kept      x and the parameters, as they came: no copy of the kernel in the compute dtype.

x may have its axes in any order; `dx` is transposed back to it. The sums of `dkernel` and `dbias`
run in float32, and each is cast once, to the dtype of its parameter.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import (
    Parameters,
    given,
    has_custom_product,
    has_own_bias,
    parameters,
)
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


@dataclass(frozen=True)
class ContractionAxes:
    """Which axes of x a product runs over; all are counted from the front and sorted.

    Attributes:
        contracted: axes of x that meet the kernel's input axes.
        batch: axes of x that meet the kernel's leading axes.
        free: the other axes of x, which come behind the batch axes in y.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]

    @property
    def kernel_batch(self) -> tuple[int, ...]:
        """The kernel's batch axes."""
        return tuple(range(len(self.batch)))

    @property
    def kernel_in(self) -> tuple[int, ...]:
        """The kernel's input axes."""
        return tuple(range(len(self.batch), len(self.batch) + len(self.contracted)))


class Residuals(NamedTuple):
    """What the backward of `linear_general` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    axes: ContractionAxes
    config: MatmulConfig


@custom_vjp
def linear_general(
    params: Parameters, x: jax.Array, axes: ContractionAxes, config: MatmulConfig
) -> jax.Array:
    """Applies a linear map over several axes.

    Args:
        params: `kernel` of shape (*batch, *in_features, *out_features), float; `bias` of shape
            (*batch, *out_features), or no bias.
        x: inputs, float, of a rank that `axes` fits.
        axes: what happens to each axis of x.
        config: dtype, precision and sharding.

    Returns:
        Outputs of shape (*batch, *free, *out_features), in the dtype of the computation.
    """
    x, kernel, bias = config.promote(x, params["kernel"], params.get("bias"))
    numbers = ((axes.contracted, axes.kernel_in), (axes.batch, axes.kernel_batch))
    y = lax.dot_general(x, kernel, numbers, **config.forward_kwargs())
    if bias is None:
        return y
    batch, out = bias.shape[: len(axes.batch)], bias.shape[len(axes.batch) :]
    return y + jnp.reshape(bias, (*batch, *(1,) * len(axes.free), *out))


def _fwd(
    params: Parameters, x: jax.Array, axes: ContractionAxes, config: MatmulConfig
) -> tuple[jax.Array, Residuals]:
    return linear_general(params, x, axes, config), Residuals(params, x, axes, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None]:
    params, axes, config = res.params, res.axes, res.config
    x, kernel = config.promote(res.x, params["kernel"])
    # Where B, F and O lie in g, and O in the kernel.
    n_batch, n_free = len(axes.batch), len(axes.free)
    g_batch = tuple(range(n_batch))
    g_free = tuple(range(n_batch, n_batch + n_free))
    g_out = tuple(range(n_batch + n_free, g.ndim))
    kernel_out = tuple(range(n_batch + len(axes.contracted), kernel.ndim))
    # The sizes of B, F, I and O, of x's own axes and of the kernel's.
    B, F, I = (tuple(x.shape[a] for a in of) for of in (axes.batch, axes.free, axes.contracted))
    O = tuple(kernel.shape[a] for a in kernel_out)
    chex.assert_shape([g, kernel], [(*B, *F, *O), (*B, *I, *O)])
    dx = input_gradient(
        g,
        kernel,
        ((g_out, kernel_out), (g_batch, axes.kernel_batch)),
        like=res.x,
        order=(*axes.batch, *axes.free, *axes.contracted),
        precision=config.precision,
    )
    dkernel = parameter_gradient(
        x,
        g,
        ((axes.free, g_free), (axes.batch, g_batch)),
        like=params["kernel"],
        precision=config.precision,
    )
    chex.assert_shape([dx, dkernel], [x.shape, kernel.shape])
    grads = {"kernel": dkernel}
    if "bias" in params:
        dbias = grads["bias"] = total(g, g_free)
        chex.assert_shape([dbias, params["bias"]], (*B, *O))
    return nnx.State(grads), dx, None, None


linear_general.defvjp(_fwd, _bwd)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with float32 sums in its backward and no copy of the kernel kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.LinearGeneral`. With
    a `dot_general`, `dot_general_cls` or `promote_dtype` of the user's own, parameters of other
    shapes than the layer says, and for integer or complex inputs or parameters, the layer computes
    as nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 2, 3))).shape
        (16, 4, 5)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array whose axes `axis` have the sizes `in_features`, and whose axes in
                `batch_axis` have the sizes given there.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *other axes of inputs, *out_features).
        """
        x, params = as_array(inputs), parameters(self, "kernel", "bias")
        batch, shape = len(self.batch_axis), params["kernel"].shape
        if (
            self.dot_general not in (None, lax.dot_general)
            or self.dot_general_cls is not None
            or shape[batch + len(self.axis) :] != tuple(self.out_features)
            or not has_own_bias(self, params, (*shape[:batch], *self.out_features))
            or not has_custom_product(self, x, params)
        ):
            return super().__call__(inputs, **given(out_sharding=out_sharding))
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return linear_general(params, x, self._axes(x), config)

    def _axes(self, inputs: jax.Array) -> ContractionAxes:
        contracted = tuple(sorted(axis % inputs.ndim for axis in self.axis))
        batch = tuple(sorted(int(axis) % inputs.ndim for axis in self.batch_axis))
        free = tuple(a for a in range(inputs.ndim) if a not in (*contracted, *batch))
        return ContractionAxes(contracted, batch, free)
