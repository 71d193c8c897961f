"""Embed: rows of a table by number, and the products of a query with every row.

    lookup    y[..., f]  = E[ids[...], f]              NaN where an id is out of range
              dE[v, f]   = sum_{...: ids[...] = v} g[..., f]
    kept      ids. Ids out of range contribute nothing, as in nnx.

    attend    y[..., v]  = sum_f q[..., f] E[v, f]
              dq[..., f] = sum_v g[..., v] E[v, f]
              dE[v, f]   = sum_... g[..., v] q[..., f]
    kept      q and E, as they came.

dE is summed in float32 and cast once to the dtype of E. Autodiff of nnx.Embed in bfloat16 adds
rows in bfloat16: with 8192 tokens that repeat, and cotangents of one sign, half of the gradient
is lost.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_sharding


class LookupResiduals(NamedTuple):
    """What the backward of `lookup` keeps: the ids (none for one row), and the table's type."""

    ids: jax.Array | None
    table: Any


@custom_vjp
def lookup(params: Parameters, ids: jax.Array, how: MatmulConfig) -> jax.Array:
    """Takes rows of a table.

    Args:
        params: `embedding` of shape (num_embeddings, features).
        ids: integers of any shape; a negative one counts from the end. A table of one row gives
            that row whatever the id.
        how: dtype and sharding.

    Returns:
        Array of shape (*ids.shape, features), NaN where an id is out of range.
    """
    (table,) = dtypes.promote_dtype((params["embedding"],), dtype=how.dtype, inexact=False)
    if table.shape[0] == 1:
        return jnp.broadcast_to(table[0], (*ids.shape, table.shape[1]))
    if how.out_sharding is None:
        return jnp.take(table, ids, axis=0)
    # jnp.take knows no out_sharding; inside auto_axes the compiler shards it.
    take = jax.sharding.auto_axes(
        lambda table, ids: jnp.take(table, ids, axis=0), out_sharding=how.out_sharding
    )
    return take(table, ids)  # pyright: ignore[reportCallIssue]


def _lookup_fwd(
    params: Parameters, ids: jax.Array, how: MatmulConfig
) -> tuple[jax.Array, LookupResiduals]:
    table = jax.typeof(params["embedding"])
    return lookup(params, ids, how), LookupResiduals(None if table.shape[0] == 1 else ids, table)


def _lookup_bwd(res: LookupResiduals, g: jax.Array) -> tuple[nnx.State, None, None]:
    ids, table = res

    def scatter(g: jax.Array, ids: jax.Array) -> jax.Array:
        zeros = jnp.zeros(table.shape, accumulator(g))
        return zeros.at[ids].add(g.astype(zeros.dtype), mode="drop")

    sharding = explicit_sharding(table)
    if ids is None:
        dtable = jnp.expand_dims(total(g, range(g.ndim - 1)), 0)
    elif sharding is None:
        dtable = scatter(g, ids)
    else:
        scatter_on_mesh = jax.sharding.auto_axes(scatter, out_sharding=sharding)
        dtable = scatter_on_mesh(g, ids)  # pyright: ignore[reportCallIssue]
    chex.assert_shape(dtable, table.shape)
    return nnx.State({"embedding": dtable}), None, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class AttendResiduals(NamedTuple):
    """What the backward of `attend` keeps: only what the caller holds anyway."""

    params: Parameters
    query: jax.Array
    how: MatmulConfig


@custom_vjp
def attend(params: Parameters, query: jax.Array, how: MatmulConfig) -> jax.Array:
    """Multiplies a query with every row of a table.

    Args:
        params: `embedding` of shape (num_embeddings, features), float.
        query: array of shape (..., features), float.
        how: dtype and sharding.

    Returns:
        Array of shape (..., num_embeddings).
    """
    query, table = how.promote(query, params["embedding"])
    return jnp.dot(query, table.T, out_sharding=how.out_sharding)


def _attend_fwd(
    params: Parameters, query: jax.Array, how: MatmulConfig
) -> tuple[jax.Array, AttendResiduals]:
    return attend(params, query, how), AttendResiduals(params, query, how)


def _attend_bwd(res: AttendResiduals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    query, table = res.how.promote(res.query, res.params["embedding"])
    rows, last = tuple(range(g.ndim - 1)), g.ndim - 1
    dquery = input_gradient(g, table, (((last,), (0,)), ((), ())), like=res.query)
    dtable = parameter_gradient(g, query, ((rows, rows), ((), ())), like=res.params["embedding"])
    chex.assert_equal_shape([dquery, query])
    chex.assert_equal_shape([dtable, table])
    return nnx.State({"embedding": dtable}), dquery, None


attend.defvjp(_attend_fwd, _attend_bwd)


class Embed(nnx.Embed):
    """`nnx.Embed` whose table gradient is summed in float32.

    Constructor, parameters, initial values and results are those of `flax.nnx.Embed`: an id out of
    range gives NaN, and a table of one row is broadcast. With a `promote_dtype` of the user's own,
    and for a complex table, the layer computes as nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Embed(5, 3, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[0, 1, 2], [-1, -2, -3]])).shape
        (2, 3, 3)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks rows up.

        Args:
            inputs: integers of any shape, from 0 to num_embeddings - 1; -1 is the last row.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*inputs.shape, features), in `dtype`.

        Raises:
            ValueError: `inputs` are not integers.
        """
        params = parameters(self, "embedding")
        # Ids are no floats, and nnx says what is wrong with ids that are no integers.
        ids = jnp.issubdtype(inputs.dtype, jnp.integer)
        if self._injected or not ids or not has_custom_backward(params["embedding"], params):
            return super().__call__(inputs, out_sharding)
        return lookup(params, inputs, MatmulConfig(self.dtype, out_sharding=out_sharding))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiplies a query with every row of the table, as an output layer that shares it does.

        Args:
            query: array of shape (..., features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., num_embeddings), in `dtype`.
        """
        params = parameters(self, "embedding")
        if self._injected or not has_custom_backward(query, params):
            return super().attend(query, out_sharding)
        return attend(params, query, MatmulConfig(self.dtype, out_sharding=out_sharding))

    @property
    def _injected(self) -> bool:
        return self.promote_dtype is not dtypes.promote_dtype
