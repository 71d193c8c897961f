"""QLoRALinear: a frozen kernel in 4 bits, and a kernel of low rank that is trained beside it.

    forward   W          = dequantized(stored),  c = alpha / rank
              h[..., r]  = c sum_i x[..., i] A[i, r]
              y[..., o]  = sum_i x[..., i] W[i, o] + sum_r h[..., r] B[r, o] + b[o]
    backward  W, h       again
              dh[..., r] = c sum_o g[..., o] B[r, o]
              dx[..., i] = sum_o g[..., o] W[i, o] + sum_r dh[..., r] A[i, r]
              dA[i, r]   = sum_... x[..., i] dh[..., r]
              dB[r, o]   = sum_... h[..., r] g[..., o]
              db[o]      = sum_... g[..., o]
    kept      x, A, B and b as they came, and what is stored: no W in floats

Sources: arXiv:2305.14314 and, for the low rank, arXiv:2106.09685.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import chex
import jax
from flax import nnx
from flax.nnx.nn.lora import default_a_initializer, default_b_initializer
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.low_bit.frozen.frozen_linear import Form, constant, constant_after
from flax_customgrad.low_bit.frozen.nf4_linear import NF4Linear
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `qlora_linear` keeps: only what the caller holds anyway."""

    params: Parameters
    stored: Parameters
    x: jax.Array
    factor: float
    how: MatmulConfig
    form: Form


@custom_vjp
def qlora_linear(
    params: Parameters,
    stored: Parameters,
    x: jax.Array,
    factor: float,
    how: MatmulConfig,
    form: Form,
) -> jax.Array:
    """Applies a linear map with a frozen kernel and one of low rank over the last axis.

    Args:
        params: `lora_a` of shape (in_features, rank), `lora_b` of shape (rank, out_features);
            `bias` of shape (out_features,), or no bias.
        stored: the frozen kernel, of shape (in_features, out_features), as `form` stores it.
        x: inputs of shape (..., in_features), float.
        factor: of the product of low rank.
        how: dtype, precision and sharding.
        form: how the frozen kernel is stored.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    a, b, bias = params["lora_a"], params["lora_b"], params.get("bias")
    x, kernel, a, b, bias = how.promote(x, constant(stored, form), a, b, bias)
    over_features = (((x.ndim - 1,), (0,)), ((), ()))
    h = factor * lax.dot_general(x, a, over_features, precision=how.precision)
    y = lax.dot_general(x, kernel, over_features, **how.forward_kwargs())
    y += lax.dot_general(h, b, over_features, **how.forward_kwargs())
    return y if bias is None else y + lax.expand_dims(bias, range(y.ndim - 1))


def _fwd(
    params: Parameters,
    stored: Parameters,
    x: jax.Array,
    factor: float,
    how: MatmulConfig,
    form: Form,
) -> tuple[jax.Array, Residuals]:
    y = qlora_linear(params, stored, x, factor, how, form)
    return y, Residuals(params, stored, x, factor, how, form)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, how, factor, p = res.params, res.how, res.factor, res.how.precision
    g, kernel = constant_after(g, res.stored, res.form)
    a, b, bias = params["lora_a"], params["lora_b"], params.get("bias")
    x, kernel, a, b, _ = how.promote(res.x, kernel, a, b, bias)
    rows, last = tuple(range(g.ndim - 1)), g.ndim - 1
    over_rows, over_outputs = ((rows, rows), ((), ())), (((last,), (1,)), ((), ()))
    h = factor * lax.dot_general(x, a, (((last,), (0,)), ((), ())), precision=p)
    dh = factor * input_gradient(g, b, over_outputs, like=h, precision=p)
    dx = input_gradient(g, kernel, over_outputs, like=res.x, precision=p)
    dx += input_gradient(dh, a, over_outputs, like=res.x, precision=p)
    grads = {
        "lora_a": parameter_gradient(x, dh, over_rows, like=a, precision=p),
        "lora_b": parameter_gradient(h, g, over_rows, like=b, precision=p),
    }
    if bias is not None:
        grads["bias"] = total(g, rows)
    chex.assert_equal_shape([dx, x])
    chex.assert_trees_all_equal_shapes(grads, dict(params))
    return nnx.State(grads), None, dx, None, None, None


qlora_linear.defvjp(_fwd, _bwd)


class QLoRALinear(NF4Linear):
    """`NF4Linear` with a kernel of low rank that is trained: y = x W + (alpha / rank) x A B + b.

    What is trained are the two `nnx.LoRAParam`s, named as in `flax.nnx.LoRA`; the rest is
    `Frozen`. It keeps the input and codes between the passes, and dequantizes in the forward and
    again in the backward. Its sources are arXiv:2305.14314 and arXiv:2106.09685.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        lora_rank: how many columns A has, and rows B.
        alpha: by which the product of low rank is multiplied, over the rank; by default the rank,
            for a factor of 1 as in `flax.nnx.LoRA`.
        lora_param_type: the type of A's and B's Variables.
        lora_param_dtype: dtype of A and B; by default `param_dtype`.
        a_initializer: initializer of A; by default He's uniform one.
        b_initializer: initializer of B; by default zeros, so that W is what is used at first.
        a_metadata: metadata of A's Variable, such as its sharding.
        b_metadata: metadata of B's Variable.
        rngs: random number generators; A and B are drawn from `params`, after the kernel.
        **nf4: what else `NF4Linear` takes: block, double_quant, train_bias, and the keywords of
            `nnx.Linear`.

    Attributes:
        lora_a: `nnx.LoRAParam` of shape (in_features, lora_rank).
        lora_b: `nnx.LoRAParam` of shape (lora_rank, out_features).

    Raises:
        ValueError: the rank is no positive integer, and what `NF4Linear` raises.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> linear = nnx.Linear(128, 64, rngs=nnx.Rngs(0))
        >>> layer = fcg.QLoRALinear.from_layer(linear, lora_rank=4, alpha=8, rngs=nnx.Rngs(1))
        >>> layer(jnp.ones((2, 128))).shape
        (2, 64)
        >>> sorted(nnx.state(layer, nnx.Param))
        ['lora_a', 'lora_b']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        alpha: float | None = None,
        lora_param_type: type[nnx.Variable] = nnx.LoRAParam,
        lora_param_dtype: Any = None,
        a_initializer: nnx.Initializer = default_a_initializer,
        b_initializer: nnx.Initializer = default_b_initializer,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **nf4: Any,
    ):
        if not isinstance(lora_rank, int) or lora_rank < 1:
            raise ValueError(f"QLoRALinear: lora_rank={lora_rank!r} must be a positive integer")
        super().__init__(in_features, out_features, rngs=rngs, **nf4)
        self.lora_rank = lora_rank
        self.alpha = float(lora_rank if alpha is None else alpha)
        dtype = lora_param_dtype or self.param_dtype
        self.lora_a = lora_param_type(
            a_initializer(rngs.params(), (in_features, lora_rank), dtype), **a_metadata
        )
        self.lora_b = lora_param_type(
            b_initializer(rngs.params(), (lora_rank, out_features), dtype), **b_metadata
        )

    @classmethod
    def from_layer(
        cls, layer: nnx.Linear, *, lora_rank: int, rngs: nnx.Rngs, **kwargs: Any
    ) -> Self:
        """A layer with the kernel of another, and its bias, dtype and precision.

        Args:
            layer: an `nnx.Linear` or the `Linear` of this library. It stays as it is.
            lora_rank: how many columns A has, and rows B.
            rngs: random number generators for A and B.
            **kwargs: the keywords that the constructor takes beyond those of `nnx.Linear`.

        Returns:
            A new layer, whose scales, A and B have the dtype of the kernel.

        Raises:
            TypeError: the layer is another one, which may compute otherwise.
            ValueError: as in the constructor.
        """
        return super().from_layer(layer, lora_rank=lora_rank, rngs=rngs, **kwargs)

    def to_layer(self) -> Linear:
        """A `Linear` with both kernels in one, the dequantized W and (alpha / rank) A B."""
        layer, low_rank = super().to_layer(), self._factor * self.lora_a[...] @ self.lora_b[...]
        layer.kernel.set_value(layer.kernel[...] + low_rank.astype(layer.kernel.dtype))
        return layer

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        inputs, params = as_array(inputs), parameters(self, "lora_a", "lora_b", "bias")
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        apply = qlora_linear if has_custom_backward(inputs, params) else qlora_linear.fun
        return apply(params, self._stored, inputs, self._factor, how, self.form)

    @property
    def _factor(self) -> float:
        return self.alpha / self.lora_rank
