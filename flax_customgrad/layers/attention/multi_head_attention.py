"""MultiHeadAttention: projections to heads, attention, and a projection of what the heads give.

Each of the projections is a `LinearGeneral`; what lies between them is `dot_product_attention`.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from flax_customgrad.contract.compat import set_class
from flax_customgrad.layers.attention.dot_product_attention import dot_product_attention, of_nnx
from flax_customgrad.layers.attention.dot_product_attention_with_rope import (
    dot_product_attention_with_rope,
    rope_of_nnx,
)
from flax_customgrad.layers.linear.linear_general import LinearGeneral
from flax_customgrad.layers.normalization.layer_norm import LayerNorm


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` that never holds the weights of all queries.

    Constructor, parameters, initial values, cache and results are those of
    `flax.nnx.MultiHeadAttention`; its projections are `LinearGeneral`s of this library. Where the
    `attention_fn` is that of nnx, with or without rotary position embeddings, or a
    `functools.partial` of one, that of this library computes; one of the user's own is called as
    nnx calls it, such as `functools.partial(fcg.dot_product_attention, window=256)`. With
    `sow_weights` attention computes as nnx does.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 1000, 16)), is_causal=True).shape
        (2, 1000, 16)

    Source: arXiv:1706.03762
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = of_nnx,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        qkv_dot_general: DotGeneralT | None = None,
        out_dot_general: DotGeneralT | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        query_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        key_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            dtype=dtype,
            param_dtype=param_dtype,
            broadcast_dropout=broadcast_dropout,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            precision=precision,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            bias_init=bias_init,
            out_bias_init=out_bias_init,
            use_bias=use_bias,
            attention_fn=attention_fn,
            decode=decode,
            normalize_qk=normalize_qk,
            qkv_promote_dtype=qkv_promote_dtype,
            out_promote_dtype=out_promote_dtype,
            ln_promote_dtype=ln_promote_dtype,
            qkv_dot_general=qkv_dot_general,
            out_dot_general=out_dot_general,
            qkv_dot_general_cls=qkv_dot_general_cls,
            out_dot_general_cls=out_dot_general_cls,
            rngs=rngs,
            keep_rngs=keep_rngs,
            kernel_metadata=kernel_metadata,
            out_kernel_metadata=out_kernel_metadata,
            bias_metadata=bias_metadata,
            out_bias_metadata=out_bias_metadata,
            query_ln_scale_metadata=query_ln_scale_metadata,
            key_ln_scale_metadata=key_ln_scale_metadata,
        )
        for projection in (self.query, self.key, self.value, self.out):
            set_class(projection, LinearGeneral)
        for norm in (self.query_ln, self.key_ln):
            if norm is not None:
                set_class(norm, LayerNorm)

    @property
    def attention_fn(self) -> Callable[..., jax.Array]:  # type: ignore[override]
        """What attends: that of this library in the place of that of nnx, or the user's own.

        The layer holds what it was given, so that it is the same layer when `revert` makes it one
        of nnx again.
        """
        return _ours(vars(self)["attention_fn"])

    @attention_fn.setter
    def attention_fn(self, function: Callable[..., jax.Array]) -> None:
        """Sets what attends."""
        vars(self)["attention_fn"] = function


def _ours(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The attention of this library in the place of that of nnx, also within a partial."""
    if isinstance(function, functools.partial):
        ours = _ours(function.func)
        is_own = ours is function.func
        return function if is_own else functools.partial(ours, *function.args, **function.keywords)
    if function is of_nnx:
        return dot_product_attention
    return function if function is not rope_of_nnx else dot_product_attention_with_rope
