"""FrozenLinear: a linear layer whose kernel is frozen, and stored in a few bits.

    forward   W          = dequantized(stored)
              y[..., o]  = sum_i x[..., i] W[i, o] + b[o]
    backward  W          = dequantized(stored), again
              dx[..., i] = sum_o g[..., o] W[i, o]
              db[o]      = sum_... g[..., o]
    kept      what is stored: no W in floats, and no x, which only dW would need

W is a constant: what is stored has no gradient. The backward waits for g before it dequantizes;
else XLA, outside of a scan, sees the same computation twice and keeps the W of the forward. On a
CPU it does so in any case: it forgets who waits for whom before it decides on an order, and
dequantizes every layer first.
"""

from typing import Any, NamedTuple, Protocol, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.low_bit.frozen.frozen_variable import Frozen
from flax_customgrad.numerics.accumulation import total
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


def constant(stored: Parameters, form: Form) -> jax.Array:
    """The kernel that is stored, without a gradient."""
    return lax.stop_gradient(form.dequantize(stored))


def constant_after(g: jax.Array, stored: Parameters, form: Form) -> tuple[jax.Array, jax.Array]:
    """A gradient, and the kernel dequantized once the gradient is there."""
    # On a CPU there would be two of each kernel at once.
    if jax.default_backend() != "cpu":
        g, stored = lax.optimization_barrier((g, stored))
    return g, form.dequantize(stored)


class Residuals(NamedTuple):
    """What the backward of `frozen_linear` keeps: what is stored, and what types there are."""

    stored: Parameters
    x: jax.ShapeDtypeStruct
    dtype: Any
    has_bias: bool
    how: MatmulConfig
    form: Form


@custom_vjp
def frozen_linear(
    params: Parameters, stored: Parameters, x: jax.Array, how: MatmulConfig, form: Form
) -> jax.Array:
    """Applies a linear map with a frozen kernel over the last axis.

    Args:
        params: `bias` of shape (out_features,), or nothing.
        stored: the kernel, of shape (in_features, out_features), as `form` stores it.
        x: inputs of shape (..., in_features), float.
        how: dtype, precision and sharding.
        form: how the kernel is stored.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    return _fwd(params, stored, x, how, form)[0]


def _fwd(
    params: Parameters, stored: Parameters, x: jax.Array, how: MatmulConfig, form: Form
) -> tuple[jax.Array, Residuals]:
    x_, kernel, *bias = how.promote(x, constant(stored, form), *params.values())
    y = lax.dot_general(x_, kernel, (((x.ndim - 1,), (0,)), ((), ())), **how.forward_kwargs())
    for b in bias:
        y += lax.expand_dims(b, range(y.ndim - 1))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding)
    return y, Residuals(stored, like, kernel.dtype, "bias" in params, how, form)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    g, kernel = constant_after(g, res.stored, res.form)
    kernel, last, p = kernel.astype(res.dtype), g.ndim - 1, res.how.precision
    dx = input_gradient(g, kernel, (((last,), (1,)), ((), ())), like=res.x, precision=p)
    chex.assert_equal_shape([dx, res.x])
    grads = {"bias": total(g, range(last))} if res.has_bias else {}
    return nnx.State(grads), None, dx, None, None


frozen_linear.defvjp(_fwd, _bwd)


class FrozenLinear(nnx.Module):
    """What the layers with a frozen kernel share: a float layer, stored in a few bits.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        form: how the kernel is stored.
        train_bias: whether the bias is an `nnx.Param`; by default it is `Frozen` as well.
        rngs: random number generators for kernel and bias.
        **linear: what else `nnx.Linear` takes.

    Raises:
        ValueError: a weight is not finite; a `dot_general` or `promote_dtype` of the user's own.

    Attributes:
        bits: how many bits a code of the kernel has.
    """

    bits = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Form,
        *,
        train_bias: bool,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        layer = Linear(in_features, out_features, rngs=rngs, **linear)
        name, kernel = type(self).__name__, layer.kernel[...]
        for given, default in (("dot_general", lax.dot_general), ("promote_dtype", promote_dtype)):
            if getattr(layer, given) is not default:
                raise ValueError(
                    f"{name}: a {given} of your own cannot multiply with codes: leave it out"
                )
        if not is_traced(kernel) and not jnp.all(jnp.isfinite(kernel)):
            raise ValueError(
                f"{name}: {jnp.sum(~jnp.isfinite(kernel))} of {kernel.size} weights are infinite "
                "or NaN, which has no code"
            )
        metadata = {"codes": linear.get("kernel_metadata", {})}
        for part, array in form.quantize(kernel).items():
            setattr(self, part, Frozen(array, **metadata.get(part, {})))
        self.bias: nnx.Variable[jax.Array] | None
        if train_bias or layer.bias is None:
            self.bias = layer.bias if layer.use_bias else nnx.data(None)
        else:
            self.bias = Frozen(layer.bias[...], **linear.get("bias_metadata", {}))
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = layer.use_bias
        self.dtype = layer.dtype
        self.param_dtype = layer.param_dtype
        self.precision = layer.precision
        self.preferred_element_type = layer.preferred_element_type

    @property
    def form(self) -> Form:
        """How the kernel is stored."""
        raise NotImplementedError

    @classmethod
    def from_layer(cls, layer: nnx.Linear, **kwargs: Any) -> Self:
        """A layer with the kernel of another, and its bias, dtype and precision.

        Args:
            layer: an `nnx.Linear` or the `Linear` of this library. It stays as it is.
            **kwargs: the keywords that the constructor takes beyond those of `nnx.Linear`.

        Returns:
            A new layer, whose scales have the dtype of the kernel.

        Raises:
            TypeError: the layer is another one, which may compute otherwise.
            ValueError: a weight is not finite; a `dot_general` or `promote_dtype` of the user's
                own.
        """
        if type(layer) not in (nnx.Linear, Linear):
            raise TypeError(
                f"{cls.__name__}.from_layer takes an nnx.Linear or a flax_customgrad.Linear, got "
                f"{type(layer).__module__}.{type(layer).__name__}"
            )
        return cls(
            layer.in_features,
            layer.out_features,
            **_arguments(layer, layer.kernel[...]),
            dot_general=layer.dot_general,
            promote_dtype=layer.promote_dtype,
            **{"rngs": nnx.Rngs(0), **kwargs},
        )

    def to_layer(self) -> Linear:
        """A `Linear` with the dequantized kernel, which computes the same."""
        arguments = _arguments(self, self.kernel)
        return Linear(self.in_features, self.out_features, **arguments, rngs=nnx.Rngs(0))

    @property
    def kernel(self) -> jax.Array:
        """The dequantized kernel, of shape (in_features, out_features) in `param_dtype`."""
        return self.form.dequantize(self._stored)

    @property
    def saved_nbytes(self) -> int:
        """How many bytes less it takes than with a kernel in floats."""
        kernel = jax.eval_shape(lambda: self.kernel)
        return kernel.size * kernel.dtype.itemsize - sum(a.nbytes for a in self._stored.values())

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        inputs, params = as_array(inputs), parameters(self, "bias")
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        apply = frozen_linear if has_custom_backward(inputs, params) else frozen_linear.fun
        return apply(params, self._stored, inputs, how, self.form)

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
