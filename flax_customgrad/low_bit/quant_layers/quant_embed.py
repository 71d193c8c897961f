"""QuantEmbed: rows of a quantized table, and the products of a quantized query with every row.

    E_q = q_w(E),  x_q = q_x(x)       of a table E and a query x

    lookup    y[..., f] = E_q[ids[...], f]                 NaN where an id is out of range
              dE_q      = sum_{...: ids[...] = v} g[..., f],  dE = dq_w(dE_q)
    kept      ids, and what the backward of the quantizer keeps

    attend    y[..., v] = sum_f x_q[..., f] E_q[v, f]
              dx_q      = sum_v g[..., v] E_q[v, f],       dx = dq_x(dx_q)
              dE_q      = sum_... g[..., v] x_q[..., f],   dE = dq_w(dE_q)
    kept      the codes of x and E, or, with residuals="original", x and E, as in `QuantLinear`

Both are composed: of the backwards `dq_x` and `dq_w` of the quantizers and those of `lookup` and
`attend`, in `embed`, with sums in float32.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_embed_init
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.linear.embed import Embed, attend, lookup
from flax_customgrad.layers.replaced_matmul import checked
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    GradientShaper,
    KeptOperands,
    QuantLayer,
)
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.products import MatmulConfig


class QuantEmbed(Embed, QuantLayer):
    """`Embed` with quantizers for its table, for a query, and for the gradient of its output.

    Takes what `flax.nnx.Embed` takes, but no operation of the user's own, and quantizers. That of
    the activation is for `attend`: ids are not quantized. The weights are `embedding`, of shape
    (num_embeddings, features), so that axis=0 gives each row its scale.

    Args:
        weight: a quantizer for the table, such as `FakeQuant(4, axis=0)`; or None.
        activation: a quantizer for the query, such as `FakeQuant(4)`; or None.
        gradient: a layer that changes the gradient of the output and nothing else; or None.
        residuals: what is kept, and what the gradient is that of: "quantized" for the codes and the
            quantized product, "original" for the operands as they came and their product.

    Raises:
        TypeError: `weight` or `activation` is no `Quantizer`, or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantEmbed(5, 3, weight=fcg.FakeQuant(4, axis=0), rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[0, 1, 2], [-1, -2, -3]])).shape
        (2, 3, 3)
    """

    _kernel = "embedding"

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ):
        super().__init__(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=embedding_init,
            promote_dtype=promote_dtype,
            rngs=rngs,
            embedding_metadata=embedding_metadata,
        )
        self._set_quantizers(weight, activation, gradient, residuals)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks rows up.

        Args:
            inputs: integers of any shape, from 0 to num_embeddings - 1; -1 is the last row.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*inputs.shape, features), in `dtype`.

        Raises:
            TypeError: the table is not floating.
            ValueError: `inputs` are not integers.
        """
        ids = jnp.asarray(inputs)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"QuantEmbed: inputs of dtype {ids.dtype} must be integers")
        params = self._parameters()
        table = params["embedding"]
        checked(self, params, table)
        if self.weight is not None:
            table = self.weight(table)
        how = MatmulConfig(self.dtype, out_sharding=out_sharding)
        return self._shaped(lookup(nnx.State({"embedding": table}), ids, how))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiplies a query with every row of the table, as an output layer that shares it does.

        Args:
            query: float array of shape (..., features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., num_embeddings), in `dtype`.

        Raises:
            TypeError: the query is not floating.
        """
        params, x = self._operands(query)
        return self._product(params, x, attend, MatmulConfig(self.dtype, out_sharding=out_sharding))

    def _parameters(self) -> Parameters:
        return parameters(self, "embedding")
