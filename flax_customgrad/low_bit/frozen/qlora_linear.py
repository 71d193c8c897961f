"""QLoRALinear: a frozen kernel in 4 bits, and a kernel of low rank that is trained beside it.

    forward   kernel        = dequantize(stored),  factor = alpha / rank
              h[..., r]     = factor sum_i x[..., i] lora_a[i, r]
              y[..., o]     = sum_i x[..., i] kernel[i, o] + sum_r h[..., r] lora_b[r, o] + bias[o]
    backward  kernel, h     again
              dh[..., r]    = factor sum_o g[..., o] lora_b[r, o]
              dx[..., i]    = sum_o g[..., o] kernel[i, o] + sum_r dh[..., r] lora_a[i, r]
              dlora_a[i, r] = sum_... x[..., i] dh[..., r]
              dlora_b[r, o] = sum_... h[..., r] g[..., o]
              dbias[o]      = sum_... g[..., o]
    kept      x, lora_a, lora_b and bias as they came, and what is stored: no kernel in floats

How the kernel is stored is on the page `nf4`.

Source: arXiv:2305.14314, and for the low rank arXiv:2106.09685
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.nnx.nn.lora import default_a_initializer, default_b_initializer
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from flax_customgrad.contract.compat import set_class
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import (
    Parameters,
    has_custom_backward,
    parameters,
    with_own_bias,
)
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.low_bit.frozen.frozen_linear import (
    Form,
    dequantize_after,
    dequantize_constant,
)
from flax_customgrad.low_bit.frozen.int4_linear import Int4Linear
from flax_customgrad.low_bit.frozen.nf4_linear import NF4Linear
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.argument_checks import check_size
from flax_customgrad.numerics.broadcasting import plus_bias
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `qlora_linear` keeps: only what the caller holds anyway."""

    params: Parameters
    stored: Parameters
    x: jax.Array
    factor: float
    config: MatmulConfig
    form: Form


@custom_vjp
def qlora_linear(
    params: Parameters,
    stored: Parameters,
    x: jax.Array,
    factor: float,
    config: MatmulConfig,
    form: Form,
) -> jax.Array:
    """Applies a linear map with a frozen kernel and one of low rank over the last axis.

    Args:
        params: `lora_a` of shape (in_features, rank), `lora_b` of shape (rank, out_features);
            `bias` of shape (out_features,), or no bias.
        stored: the frozen kernel, of shape (in_features, out_features), as `form` stores it.
        x: inputs of shape (..., in_features), float.
        factor: of the product of low rank.
        config: dtype, precision and sharding.
        form: how the frozen kernel is stored.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    x, kernel, lora_a, lora_b, bias = config.promote(
        x,
        dequantize_constant(stored, form),
        params["lora_a"],
        params["lora_b"],
        params.get("bias"),
    )
    over_last = (((x.ndim - 1,), (0,)), ((), ()))
    h = factor * lax.dot_general(x, lora_a, over_last, precision=config.precision)
    y = lax.dot_general(x, kernel, over_last, **config.forward_kwargs())
    y += lax.dot_general(h, lora_b, over_last, **config.forward_kwargs())
    return plus_bias(y, bias)


def _fwd(
    params: Parameters,
    stored: Parameters,
    x: jax.Array,
    factor: float,
    config: MatmulConfig,
    form: Form,
) -> tuple[jax.Array, Residuals]:
    y = qlora_linear(params, stored, x, factor, config, form)
    return y, Residuals(params, stored, x, factor, config, form)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, None, jax.Array, None, None, None]:
    params, config, factor, precision = res.params, res.config, res.factor, res.config.precision
    g, kernel = dequantize_after(g, res.stored, res.form)
    x, kernel, lora_a, lora_b, _ = config.promote(
        res.x, kernel, params["lora_a"], params["lora_b"], params.get("bias")
    )
    dims = chex.Dimensions(I=kernel.shape[0], O=kernel.shape[1], R=lora_a.shape[1])
    batch, rows, last = x.shape[:-1], tuple(range(g.ndim - 1)), g.ndim - 1
    chex.assert_shape([lora_a, lora_b], [dims["IR"], dims["RO"]])
    chex.assert_shape([x, g], [(*batch, *dims["I"]), (*batch, *dims["O"])])
    over_rows, over_last = ((rows, rows), ((), ())), (((last,), (1,)), ((), ()))
    h = factor * lax.dot_general(x, lora_a, (((last,), (0,)), ((), ())), precision=precision)
    dh = factor * input_gradient(g, lora_b, over_last, like=h, precision=precision)
    dx = input_gradient(g, kernel, over_last, like=res.x, precision=precision)
    dx += input_gradient(dh, lora_a, over_last, like=res.x, precision=precision)
    dlora_a = parameter_gradient(x, dh, over_rows, like=lora_a, precision=precision)
    dlora_b = parameter_gradient(h, g, over_rows, like=lora_b, precision=precision)
    chex.assert_shape([dx, h, dh], [x.shape, (*batch, *dims["R"]), (*batch, *dims["R"])])
    grads = {"lora_a": dlora_a, "lora_b": dlora_b}
    if "bias" in params:
        grads["bias"] = total(g, rows)
    chex.assert_trees_all_equal_shapes(grads, dict(params))
    return nnx.State(grads), None, dx, None, None, None


qlora_linear.defvjp(_fwd, _bwd)


class QLoRALinear(NF4Linear):
    """`NF4Linear` with a kernel of low rank that is trained: y = x W + (alpha / rank) x A B + b.

    What is trained are A and B, each an `nnx.LoRAParam`, named as in `flax.nnx.LoRA`; the rest is
    `Frozen`. It keeps the input and codes between the passes, and dequantizes in the forward and
    again in the backward.

    Takes what `NF4Linear` takes, and the arguments below.

    Args:
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

    Source: arXiv:2305.14314, and for the low rank arXiv:2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Any = lax.dot_general,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        block: int = 64,
        double_quant: bool = True,
        train_bias: bool = False,
        lora_rank: int,
        alpha: float | None = None,
        lora_param_type: type[nnx.Variable] = nnx.LoRAParam,
        lora_param_dtype: Dtype | None = None,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            block=block,
            double_quant=double_quant,
            train_bias=train_bias,
        )
        self._set_low_rank(
            lora_rank,
            rngs,
            alpha,
            lora_param_type,
            lora_param_dtype,
            a_initializer,
            b_initializer,
            a_metadata,
            b_metadata,
        )

    def _set_low_rank(
        self,
        lora_rank: int,
        rngs: nnx.Rngs,
        alpha: float | None = None,
        lora_param_type: type[nnx.Variable] = nnx.LoRAParam,
        lora_param_dtype: Dtype | None = None,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Gives the layer its kernel of low rank, or each layer of a stack one."""
        lora_rank = check_size("QLoRALinear", "lora_rank", lora_rank)
        self.lora_rank = lora_rank
        self.alpha = float(lora_rank if alpha is None else alpha)
        axes, dtype = self.stack_axes, lora_param_dtype or self.param_dtype

        def draw(init: Initializer, *shape: int) -> jax.Array:
            drawn = [init(rngs.params(), shape, dtype) for _ in range(math.prod(axes))]
            return jnp.stack(drawn).reshape(*axes, *shape)

        a = draw(a_initializer, self.in_features, lora_rank)
        b = draw(b_initializer, lora_rank, self.out_features)
        self.lora_a, self.lora_b = (
            lora_param_type(a, **a_metadata),
            lora_param_type(b, **b_metadata),
        )

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear | NF4Linear | Int4Linear,
        *,
        lora_rank: int,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> Self:
        """A layer with the kernel of another, and its bias, dtype and precision.

        Args:
            layer: an `nnx.Linear` or the `Linear` of this library, or one that is frozen already,
                an `NF4Linear` or `Int4Linear`, whose codes it holds. It stays as it is.
            lora_rank: how many columns A has, and rows B.
            rngs: random number generators for A and B.
            **kwargs: the keywords that the constructor takes beyond those of `nnx.Linear`.

        Returns:
            A new layer, whose scales, A and B have the dtype of the kernel.

        Raises:
            TypeError: the layer is of another class, which may compute something else.
            ValueError: as in the constructor.
        """
        if type(layer) not in (NF4Linear, Int4Linear):
            linear: Any = layer
            return super().from_layer(linear, lora_rank=lora_rank, rngs=rngs, **kwargs)
        qlora: Any = nnx.clone(layer, graph=True)
        set_class(qlora, cls)
        qlora._set_low_rank(lora_rank, rngs, **kwargs)
        return qlora

    def _to_one(self) -> Linear:
        """A `Linear` with both kernels in one, the dequantized W and (alpha / rank) A B."""
        layer, low_rank = super()._to_one(), self._factor * self.lora_a[...] @ self.lora_b[...]
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
        params = with_own_bias(self, params, (self.out_features,))
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        is_own = has_custom_backward(inputs, params, self.dtype)
        apply = qlora_linear if is_own else qlora_linear.fun
        return apply(params, self._stored, inputs, self._factor, config, self.form)

    @property
    def _factor(self) -> float:
        return self.alpha / self.lora_rank
