"""QuantEmbed: rows of a quantized table, and the products of a quantized query with every row.

    lookup    y[..., f] = q_w(E)[ids[...], f]              NaN where an id is out of range
              dE        = dq_w(sum_{...: ids[...] = v} g[..., f])
    kept      ids, and what the backward of the quantizer keeps

    attend    y[..., v] = sum_f q_x(q)[..., f] q_w(E)[v, f]
              dq        = dq_x(sum_v g[..., v] q_w(E)[v, f])
              dE        = dq_w(sum_... g[..., v] q_x(q)[..., f])
    kept      the codes of q and E, or, with residuals="original", q and E, as in `QuantLinear`

dq_w and dq_x are the backwards of the quantizers. The sums are those of `embed`, in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.linear.embed import Embed, attend, lookup
from flax_customgrad.layers.replaced_matmul import checked
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing
from flax_customgrad.numerics.products import MatmulConfig


class QuantEmbed(Embed, QuantLayer):
    """`Embed` with quantizers for its table, for a query, and for the gradient of its output.

    Takes what `flax.nnx.Embed` takes, and `weight`, `activation`, `gradient` and `residuals` of
    `QuantLinear`. The activation's quantizer is for `attend`: ids are not quantized. Its weights
    are `embedding`, of shape (num_embeddings, features), so that axis=0 gives each row its scale.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantEmbed(5, 3, weight=fcg.FakeQuant(4, axis=0), rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[0, 1, 2], [-1, -2, -3]])).shape
        (2, 3, 3)
    """

    _kernel = "embedding"

    @quantizing(nnx.Embed.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
