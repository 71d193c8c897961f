"""LoRA: a product with a kernel of low rank, alone or beside another layer.

    forward   h[..., r]     = sum_i x[..., i] lora_a[i, r]
              y[..., o]     = sum_r h[..., r] lora_b[r, o]
    backward  dlora_b[r, o] = sum_... h[..., r] g[..., o]
              dh[..., r]    = sum_o g[..., o] lora_b[r, o]
              dlora_a[i, r] = sum_... x[..., i] dh[..., r]
              dx[..., i]    = sum_r dh[..., r] lora_a[i, r]
    kept      x, lora_a and lora_b as they came, and h, which is of the rank's width: to compute it
              again would cost a sixth of the step and save a hundredth of what x takes.

`dlora_a`, `dlora_b` and `dh` are summed in float32; the first two are cast once, to the dtype of
their parameter.

Source: arXiv:2106.09685
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.lora import default_a_initializer, default_b_initializer

from flax_customgrad.contract.compat import set_class
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, given, has_custom_product, parameters
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.replaced_matmul import adopted
from flax_customgrad.layers.stacked import Index, for_each, stack_axes
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `lora` keeps: what the caller holds, and h of the rank's width."""

    params: Parameters
    x: jax.Array
    h: jax.Array
    config: MatmulConfig


@custom_vjp(leading_axes=True)
def lora(params: Parameters, x: jax.Array, config: MatmulConfig) -> jax.Array:
    """Applies a linear map of low rank over the last axis.

    Args:
        params: `lora_a` of shape (in_features, rank), `lora_b` of shape (rank, out_features).
        x: inputs of shape (..., in_features).
        config: dtype of the computation.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    return _fwd(params, x, config)[0]


def _fwd(params: Parameters, x: jax.Array, config: MatmulConfig) -> tuple[jax.Array, Residuals]:
    x_, lora_a, lora_b = config.promote(x, params["lora_a"], params["lora_b"])
    h = x_ @ lora_a
    return h @ lora_b, Residuals(params, x, h, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params, h = res.params, res.h
    x, lora_a, lora_b = res.config.promote(res.x, params["lora_a"], params["lora_b"])
    dims = chex.Dimensions(I=lora_a.shape[0], R=lora_a.shape[1], O=lora_b.shape[1])
    batch, rows, last = x.shape[:-1], tuple(range(g.ndim - 1)), g.ndim - 1
    chex.assert_shape([h, g], [(*batch, *dims["R"]), (*batch, *dims["O"])])
    over_last, over_rows = (((last,), (1,)), ((), ())), ((rows, rows), ((), ()))
    dlora_b = parameter_gradient(h, g, over_rows, like=params["lora_b"])
    dh = parameter_gradient(g, lora_b, over_last, like=h)
    dlora_a = parameter_gradient(x, dh, over_rows, like=params["lora_a"])
    dx = input_gradient(dh, lora_a, over_last, like=res.x)
    chex.assert_shape([dx, dlora_a, dlora_b], [x.shape, dims["IR"], dims["RO"]])
    return nnx.State({"lora_a": dlora_a, "lora_b": dlora_b}), dx, None


lora.defvjp(_fwd, _bwd)


class LoRA(nnx.LoRA):
    """`nnx.LoRA` with float32 sums in its backward and no copy of the kernels kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.LoRA`. With a
    `promote_dtype` of the user's own, and for integer or complex inputs, the layer computes as
    nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LoRA(3, 2, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 3))).shape
        (16, 4)

    Source: arXiv:2106.09685
    """

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Applies the layer, and adds what the base module gives for the same input.

        Args:
            x: array of shape (..., in_features).
            **kwargs: passed on to the base module.

        Returns:
            Array of shape (..., out_features).

        Raises:
            ValueError: the base module is not callable.
        """
        inputs, params = as_array(x), parameters(self, "lora_a", "lora_b")
        if not has_custom_product(self, inputs, params):
            return super().__call__(x, **kwargs)
        config = MatmulConfig(self.dtype)
        out = lora(params, inputs, config)
        if self.base_module is not None:
            if not callable(self.base_module):
                raise ValueError("`self.base_module` must be callable.")
            promoted, *_ = config.promote(inputs, *params.values())  # as nnx hands it on
            out += self.base_module(promoted, **kwargs)
        return out


class LoRALinear(nnx.LoRALinear, Linear):
    """`nnx.LoRALinear` made of `Linear` and `LoRA` of this library.

    Parameters, initial values and results are those of `flax.nnx.LoRALinear`.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        lora_rank: the rank of the added product.
        lora_dtype: dtype in which it is computed, or None to infer it.
        lora_param_dtype: dtype of `lora_a` and `lora_b`.
        a_initializer: makes `lora_a`, of shape (in_features, lora_rank).
        b_initializer: makes `lora_b`, of shape (lora_rank, out_features).
        lora_param_type: the class of the Variables that hold them.
        lora_promote_dtype: promotes the arrays of the added product to one dtype.
        rngs: the random streams for the initial values.
        a_metadata: metadata of `lora_a`.
        b_metadata: metadata of `lora_b`.
        **kwargs: keyword arguments of `Linear`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 3))).shape
        (16, 4)

    Source: arXiv:2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: Any = None,
        lora_param_dtype: Any = jnp.float32,
        a_initializer: Callable[..., jax.Array] = default_a_initializer,
        b_initializer: Callable[..., jax.Array] = default_b_initializer,
        lora_param_type: type[nnx.Variable] = nnx.LoRAParam,
        lora_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ):
        super().__init__(
            in_features,
            out_features,
            lora_rank=lora_rank,
            lora_dtype=lora_dtype,
            lora_param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            lora_promote_dtype=lora_promote_dtype,
            rngs=rngs,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
            **kwargs,
        )
        set_class(self.lora, LoRA)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        lora_rank: int,
        lora_dtype: Any = None,
        lora_param_dtype: Any = jnp.float32,
        a_initializer: Callable[..., jax.Array] = default_a_initializer,
        b_initializer: Callable[..., jax.Array] = default_b_initializer,
        lora_param_type: type[nnx.Variable] = nnx.LoRAParam,
        lora_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        a_metadata: Mapping[str, Any] = MappingProxyType({}),
        b_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Adds a product of low rank to a linear layer, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear`, trained or not.
            lora_rank: as for the constructor, as are all others.
            lora_dtype: dtype in which the product is computed, or None to infer it.
            lora_param_dtype: dtype of `lora_a` and `lora_b`.
            a_initializer: makes `lora_a`, of shape (in_features, lora_rank).
            b_initializer: makes `lora_b`, of shape (lora_rank, out_features).
            lora_param_type: the class of the Variables that hold them.
            lora_promote_dtype: promotes the arrays of the product to one dtype.
            rngs: the random streams for their initial values.
            a_metadata: metadata of `lora_a`.
            b_metadata: metadata of `lora_b`.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Linear`, or has a `__call__` of its own, or a product of
                low rank already.
            ValueError: an operation is injected.
        """

        def low_rank(_: Index) -> LoRA:
            return LoRA(
                layer.in_features,
                lora_rank,
                layer.out_features,
                dtype=lora_dtype,
                param_dtype=lora_param_dtype,
                a_initializer=a_initializer,
                b_initializer=b_initializer,
                lora_param_type=lora_param_type,
                promote_dtype=lora_promote_dtype,
                rngs=rngs,
                a_metadata=a_metadata,
                b_metadata=b_metadata,
            )

        if isinstance(layer, nnx.LoRALinear):
            raise TypeError(
                f"{cls.__name__}.from_layer: a {type(layer).__name__} has a product of low rank "
                "already; flax_customgrad.convert(model) makes it a drop-in"
            )
        with adopted(cls, layer, nnx.Linear) as adapted:
            adapted.lora = for_each(low_rank, stack_axes(layer))
        return adapted

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the linear layer, and adds the product of low rank.

        Args:
            x: array of shape (..., in_features).
            out_sharding: sharding of the linear layer's result on a mesh with Explicit axes, or
                None.

        Returns:
            Array of shape (..., out_features).
        """
        return Linear.__call__(self, x, **given(out_sharding=out_sharding)) + self.lora(x)
