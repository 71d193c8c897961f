"""FrozenLinear: a linear layer whose kernel is frozen, and stored in a few bits.

    forward   kernel     = dequantize(stored)
              y[..., o]  = sum_i x[..., i] kernel[i, o] + bias[o]
    backward  kernel     = dequantize(stored), again
              dx[..., i] = sum_o g[..., o] kernel[i, o]
              dbias[o]   = sum_... g[..., o]
    kept      what is stored: no kernel in floats, and no x, which only its gradient would need

The kernel is a constant: what is stored has no gradient. The backward waits for g before it
dequantizes; else XLA, outside of a scan, sees the same computation twice and keeps the kernel of
the forward. On a CPU it does so in any case: it forgets who waits for whom before it decides on an
order, and dequantizes every layer first.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.layers.drop_in import (
    Parameters,
    has_custom_backward,
    parameters,
    with_own_bias,
)
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.replaced_matmul import refuse_injected
from flax_customgrad.layers.stacked import for_each, stack_axes, unstack
from flax_customgrad.low_bit.frozen.frozen_variable import Frozen
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.broadcasting import plus_bias
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient


class Form(Protocol):
    """How a kernel is stored; hashable."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the arrays that are stored."""
        ...

    def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
        """Stores a kernel of shape (in_features, out_features)."""
        ...

    def dequantize(self, stored: Parameters) -> jax.Array:
        """The kernel that is stored."""
        ...


def dequantize_constant(stored: Parameters, form: Form) -> jax.Array:
    """The kernel that is stored, without a gradient."""
    return lax.stop_gradient(form.dequantize(stored))


def dequantize_after(g: jax.Array, stored: Parameters, form: Form) -> tuple[jax.Array, jax.Array]:
    """A cotangent, and the kernel that is stored, dequantized once the cotangent is there."""
    # On a CPU there would be two of each kernel at once.
    if jax.default_backend() != "cpu":
        g, stored = wait_for(g, stored)
    return g, form.dequantize(stored)


class Residuals(NamedTuple):
    """What the backward of `frozen_linear` keeps: what is stored, and types.

    Attributes:
        stored: the kernel, which the caller holds.
        x_type: shape, dtype and sharding of x.
        dtype: of the computation.
        has_bias: whether there is a bias.
        config: dtype, precision and sharding.
        form: how the kernel is stored.
    """

    stored: Parameters
    x_type: jax.ShapeDtypeStruct
    dtype: Any
    has_bias: bool
    config: MatmulConfig
    form: Form


@custom_vjp
def frozen_linear(
    params: Parameters, stored: Parameters, x: jax.Array, config: MatmulConfig, form: Form
) -> jax.Array:
    """Applies a linear map with a frozen kernel over the last axis.

    Args:
        params: `bias` of shape (out_features,), or nothing.
        stored: the kernel, of shape (in_features, out_features), as `form` stores it.
        x: inputs of shape (..., in_features), float.
        config: dtype, precision and sharding.
        form: how the kernel is stored.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    return _fwd(params, stored, x, config, form)[0]


def _fwd(
    params: Parameters, stored: Parameters, x: jax.Array, config: MatmulConfig, form: Form
) -> tuple[jax.Array, Residuals]:
    x_, kernel, bias = config.promote(x, dequantize_constant(stored, form), params.get("bias"))
    y = lax.dot_general(x_, kernel, (((x.ndim - 1,), (0,)), ((), ())), **config.forward_kwargs())
    y = plus_bias(y, bias)
    x_type = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding)
    return y, Residuals(stored, x_type, kernel.dtype, "bias" in params, config, form)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, None, jax.Array, None, None]:
    g, kernel = dequantize_after(g, res.stored, res.form)
    kernel, batch, last = kernel.astype(res.dtype), res.x_type.shape[:-1], g.ndim - 1
    dims = chex.Dimensions(I=kernel.shape[0], O=kernel.shape[1])
    chex.assert_shape(g, (*batch, *dims["O"]))
    over_o = (((last,), (1,)), ((), ()))
    dx = input_gradient(g, kernel, over_o, like=res.x_type, precision=res.config.precision)
    chex.assert_shape(dx, (*batch, *dims["I"]))
    grads = {}
    if res.has_bias:
        dbias = grads["bias"] = total(g, range(last))
        chex.assert_shape(dbias, dims["O"])
    return nnx.State(grads), None, dx, None, None


frozen_linear.defvjp(_fwd, _bwd)


class FrozenLinear(nnx.Module):
    """What the layers with a frozen kernel share: a float layer, stored in a few bits.

    Args:
        layer: the float layer, whose kernel is stored and whose bias is taken over.
        form: how the kernel is stored.
        train_bias: whether the bias is an `nnx.Param`; otherwise it is `Frozen` as well.
        kernel_metadata: metadata of the codes' Variable.
        bias_metadata: metadata of the bias's Variable.

    Attributes:
        bits: how many bits a code of the kernel has.
        form: how the kernel is stored.

    Raises:
        ValueError: a weight is not finite; a `dot_general` or `promote_dtype` of the user's own.
    """

    bits = 4
    codes: Frozen

    def __init__(
        self,
        layer: Linear,
        form: Form,
        *,
        train_bias: bool,
        kernel_metadata: Mapping[str, Any],
        bias_metadata: Mapping[str, Any],
    ):
        self.form = form
        name, kernel = type(self).__name__, layer.kernel[...]
        refuse_injected(name, layer)
        if not is_traced(kernel) and not jnp.all(jnp.isfinite(kernel)):
            raise ValueError(
                f"{name}: {jnp.sum(~jnp.isfinite(kernel))} of {kernel.size} weights are infinite "
                "or NaN, which has no code"
            )
        for part, array in form.quantize(kernel).items():
            setattr(self, part, Frozen(array, **(kernel_metadata if part == "codes" else {})))
        self.bias: nnx.Variable[jax.Array] | None
        if train_bias or layer.bias is None:
            self.bias = layer.bias if layer.use_bias else nnx.data(None)
        else:
            self.bias = Frozen(layer.bias[...], **bias_metadata)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.use_bias = layer.use_bias
        self.dtype = layer.dtype
        self.param_dtype = layer.param_dtype
        self.precision = layer.precision
        self.preferred_element_type = layer.preferred_element_type

    @classmethod
    def from_layer(cls, layer: nnx.Linear, **kwargs: Any) -> Self:
        """A layer with the kernel of another, and its bias, dtype and precision.

        Args:
            layer: an `nnx.Linear` or the `Linear` of this library. It stays as it is.
            **kwargs: the keywords that the constructor takes beyond those of `nnx.Linear`.

        Returns:
            A new layer, whose scales have the dtype of the kernel.

        Raises:
            TypeError: the layer is of another class, which may compute something else.
            ValueError: a weight is not finite; a `dot_general` or `promote_dtype` of the user's
                own.
        """
        if type(layer) not in (nnx.Linear, Linear):
            raise TypeError(
                f"{cls.__name__}.from_layer takes an nnx.Linear or a flax_customgrad.Linear, got "
                f"{type(layer).__module__}.{type(layer).__name__}"
            )
        axes = stack_axes(layer)
        layers = unstack(layer, axes)
        frozen = for_each(lambda index: cls._of_one(layers[index], kwargs), axes)
        # Not by the constructor, which would shard anew what has its sharding.
        of: dict[str, tuple[str, Any]] = {
            "codes": ("kernel_metadata", layer.kernel),
            "bias": ("bias_metadata", layer.bias),
        }
        for name, (keyword, variable) in of.items():
            held = getattr(frozen, name)
            if held is not None and keyword not in kwargs:
                kind = type(held) if isinstance(held, Frozen) else type(variable)
                value = held[...]
                setattr(frozen, name, kind.from_metadata(value, variable.get_metadata()))
        return frozen

    @classmethod
    def _of_one(cls, layer: nnx.Linear, kwargs: Mapping[str, Any]) -> Self:
        """`from_layer` for a layer that is no stack, without the metadata of its Variables."""
        make: Any = cls
        return make(
            layer.in_features,
            layer.out_features,
            **_arguments(layer, layer.kernel[...]),
            dot_general=layer.dot_general,
            promote_dtype=layer.promote_dtype,
            **{"rngs": nnx.Rngs(0), **kwargs},
        )

    def share(self, other: "FrozenLinear") -> None:
        """Holds the stored kernel of another layer, if it is equal: one Param was in both.

        Args:
            other: a layer that was made of a layer with the same Param.
        """
        mine, others = self._stored, other._stored
        if (
            type(self) is type(other)
            and self.form == other.form
            and all(jnp.array_equal(mine[part], others[part]) for part in self.form.parts)
        ):
            for part in self.form.parts:
                setattr(self, part, getattr(other, part))

    def to_layer(self) -> Linear:
        """A `Linear` with the dequantized kernel, which computes the same."""
        layers = unstack(self, self.stack_axes)
        layer: Any = for_each(lambda index: layers[index]._to_one(), self.stack_axes)
        layer.kernel = nnx.Param.from_metadata(layer.kernel[...], self.codes.get_metadata())
        if self.bias is not None and layer.bias is not None:
            metadata = self.bias.get_metadata()
            layer.bias = nnx.Param.from_metadata(layer.bias[...], metadata)
        return layer

    def _to_one(self) -> Linear:
        """`to_layer` for a layer that is no stack, without the metadata of its Variables."""
        arguments = _arguments(self, self.kernel)
        return Linear(self.in_features, self.out_features, **arguments, rngs=nnx.Rngs(0))

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked layers; () for one layer."""
        return self.codes.shape[:-2]

    @property
    def kernel(self) -> jax.Array:
        """The dequantized kernel, of shape (in_features, out_features) in `param_dtype`."""
        return self.form.dequantize(self._stored)

    @property
    def saved_nbytes(self) -> int:
        """How many bytes less it takes than with a kernel in floats."""
        weights = math.prod((*self.stack_axes, self.in_features, self.out_features))
        held = sum(a.nbytes for a in self._stored.values())
        return weights * jnp.dtype(self.param_dtype).itemsize - held

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        inputs, params = as_array(inputs), parameters(self, "bias")
        params = with_own_bias(self, params, (self.out_features,))
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        is_own = has_custom_backward(inputs, params, self.dtype)
        apply = frozen_linear if is_own else frozen_linear.fun
        return apply(params, self._stored, inputs, config, self.form)

    @property
    def _stored(self) -> Parameters:
        return parameters(self, *self.form.parts)


def _arguments(layer: Any, kernel: jax.Array) -> dict[str, Any]:
    """What a layer with these values is made with."""
    bias = None if layer.bias is None else layer.bias[...]
    return {
        "use_bias": layer.use_bias,
        "dtype": layer.dtype,
        "param_dtype": kernel.dtype,
        "precision": layer.precision,
        "preferred_element_type": layer.preferred_element_type,
        "kernel_init": lambda *_: kernel,
        "bias_init": lambda *_: bias,
    }
