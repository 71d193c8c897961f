"""Embed: rows of a table by number, and the products of a query with every row.

    lookup    y[..., f]        = table[ids[...], f]    NaN where an id is out of range
              dtable[v, f]     = sum_{...: ids[...] = v} g[..., f]
    kept      ids. Ids out of range contribute nothing, as in nnx.

    attend    y[..., v]        = sum_f query[..., f] table[v, f]
              dquery[..., f]   = sum_v g[..., v] table[v, f]
              dtable[v, f]     = sum_... g[..., v] query[..., f]
    kept      query and table, as they came.

`table` is the parameter `embedding`. `dtable` is summed in float32 and cast once to its dtype; of a
table in half precision with few ids, only the rows that they name.
Autodiff of nnx.Embed in bfloat16 adds rows in bfloat16: with 8192 tokens that repeat, and
cotangents of one sign, half of the gradient is lost.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, given, has_custom_product, parameters
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_sharding
from flax_customgrad.numerics.sizes import is_known


class LookupResiduals(NamedTuple):
    """What the backward of `lookup` keeps: the ids (none for one row), and the table's type."""

    ids: jax.Array | None
    table_type: Any


@custom_vjp(leading_axes=True)
def lookup(params: Parameters, ids: jax.Array, config: MatmulConfig) -> jax.Array:
    """Takes rows of a table.

    Args:
        params: `embedding` of shape (num_embeddings, features).
        ids: integers of any shape; a negative one counts from the end. A table of one row gives
            that row whatever the id.
        config: dtype and sharding.

    Returns:
        Array of shape (*ids.shape, features), NaN where an id is out of range.
    """
    (table,) = dtypes.promote_dtype((params["embedding"],), dtype=config.dtype, inexact=False)
    if table.shape[0] == 1:
        return jnp.broadcast_to(table[0], (*ids.shape, table.shape[1]))
    ids = _as_row_numbers(ids)
    if config.out_sharding is None:
        return jnp.take(table, ids, axis=0)
    # jnp.take knows no out_sharding; inside auto_axes the compiler shards it.
    take = jax.sharding.auto_axes(
        lambda table, ids: jnp.take(table, ids, axis=0), out_sharding=config.out_sharding
    )
    return take(table, ids)  # pyright: ignore[reportCallIssue]


def _lookup_fwd(
    params: Parameters, ids: jax.Array, config: MatmulConfig
) -> tuple[jax.Array, LookupResiduals]:
    table_type = jax.typeof(params["embedding"])
    kept = None if table_type.shape[0] == 1 else ids
    return lookup(params, ids, config), LookupResiduals(kept, table_type)


def _lookup_bwd(res: LookupResiduals, g: jax.Array) -> tuple[nnx.State, None, None]:
    ids, table_type = res
    dims = chex.Dimensions(V=table_type.shape[0], F=table_type.shape[1])
    chex.assert_shape(g, (..., *dims["F"]) if ids is None else (*ids.shape, *dims["F"]))

    def scatter(g: jax.Array, ids: jax.Array) -> jax.Array:
        zeros = jnp.zeros(table_type.shape, accumulator(g))
        return zeros.at[_as_row_numbers(ids)].add(g.astype(zeros.dtype), mode="drop")

    is_half = table_type.dtype != accumulator(table_type, g)
    sharding = explicit_sharding(table_type)
    if ids is None:
        dtable = jnp.expand_dims(total(g, range(g.ndim - 1)), 0)
    elif sharding is None and is_half and _is_mostly_zero(table_type.shape[0], ids.size):
        dtable = _rows_alone(g, ids, table_type)
    elif sharding is None:
        dtable = scatter(g, ids)
    else:
        scatter_on_mesh = jax.sharding.auto_axes(scatter, out_sharding=sharding)
        dtable = scatter_on_mesh(g, ids)  # pyright: ignore[reportCallIssue]
    chex.assert_shape(dtable, dims["VF"])
    return nnx.State({"embedding": dtable}), None, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def _is_mostly_zero(n_rows: int, n_ids: Any) -> bool:
    """Whether it pays to sum the rows that ids name apart from the table's gradient.

    XLA of JAX 0.10 scatters half precision in a float32 copy of the table, as the sum itself does.
    """
    return is_known(n_ids) and n_rows >= 4 * n_ids and jax.__version_info__ >= (0, 12)


def _rows_alone(g: jax.Array, ids: jax.Array, table_type: Any) -> jax.Array:
    """The gradient of a table in half precision, without one of it in float32.

    The rows that ids name are summed in float32, an array as large as g, and rounded. Of the ids
    that name one row, the one that was written down last stands for it.
    """
    n_rows, features = table_type.shape
    ids, g = _as_row_numbers(ids).reshape(-1), g.reshape(-1, features)
    places = lax.iota(jnp.int32, ids.size)
    last = jnp.zeros(n_rows, jnp.int32).at[ids].set(places, mode="drop")
    # Out of range an id stands for nothing, and is dropped as one more place.
    of_row = last.at[ids].get(mode="fill", fill_value=ids.size)
    sums = jnp.zeros(g.shape, accumulator(g)).at[of_row].add(g.astype(accumulator(g)), mode="drop")
    rows = jnp.where(of_row == places, ids, n_rows)
    zeros = jnp.zeros(table_type.shape, table_type.dtype)
    return zeros.at[rows].set(sums.astype(zeros.dtype), mode="drop")


def _as_row_numbers(ids: jax.Array) -> jax.Array:
    """Ids in a dtype that holds every number of a row: JAX counts from the end in that of the ids.

    There -1 in int8 is row 43 of 300.
    """
    return ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)


class AttendResiduals(NamedTuple):
    """What the backward of `attend` keeps: only what the caller holds anyway."""

    params: Parameters
    query: jax.Array
    config: MatmulConfig


@custom_vjp(leading_axes=True)
def attend(params: Parameters, query: jax.Array, config: MatmulConfig) -> jax.Array:
    """Multiplies a query with every row of a table.

    Args:
        params: `embedding` of shape (num_embeddings, features), float.
        query: array of shape (..., features), float.
        config: dtype and sharding.

    Returns:
        Array of shape (..., num_embeddings).
    """
    query, table = config.promote(query, params["embedding"])
    return jnp.dot(query, table.T, out_sharding=config.out_sharding)


def _attend_fwd(
    params: Parameters, query: jax.Array, config: MatmulConfig
) -> tuple[jax.Array, AttendResiduals]:
    return attend(params, query, config), AttendResiduals(params, query, config)


def _attend_bwd(res: AttendResiduals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    query, table = res.config.promote(res.query, res.params["embedding"])
    dims = chex.Dimensions(V=table.shape[0], F=table.shape[1])
    batch, rows, last = query.shape[:-1], tuple(range(g.ndim - 1)), g.ndim - 1
    chex.assert_shape([query, g], [(*batch, *dims["F"]), (*batch, *dims["V"])])
    over_v, over_rows = (((last,), (0,)), ((), ())), ((rows, rows), ((), ()))
    dquery = input_gradient(g, table, over_v, like=res.query)
    dtable = parameter_gradient(g, query, over_rows, like=res.params["embedding"])
    chex.assert_shape([dquery, dtable], [query.shape, dims["VF"]])
    return nnx.State({"embedding": dtable}), dquery, None


attend.defvjp(_attend_fwd, _attend_bwd)


class Embed(nnx.Embed):
    """`nnx.Embed` whose table gradient is summed in float32.

    Constructor, parameters, initial values and results are those of `flax.nnx.Embed`: an id out of
    range gives NaN, and a table of one row is broadcast. Negative ids of 8 or 16 bits count from
    the end of a table of any size. With a `promote_dtype` of the user's own, and for a complex
    table, the layer computes as nnx does and JAX differentiates that.

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
        ids, params = as_array(inputs), parameters(self, "embedding")
        # Ids are no floats, and nnx says what is wrong with ids that are no integers.
        if (
            not jnp.issubdtype(ids.dtype, jnp.integer)
            or not self._has_own_rows(params["embedding"].shape)
            or not has_custom_product(self, params["embedding"], params)
        ):
            return super().__call__(inputs, **given(out_sharding=out_sharding))
        return lookup(params, ids, MatmulConfig(self.dtype, out_sharding=out_sharding))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiplies a query with every row of the table, as an output layer that shares it does.

        Args:
            query: array of shape (..., features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., num_embeddings), in `dtype`.
        """
        x, params = as_array(query), parameters(self, "embedding")
        if params["embedding"].ndim != 2 or not has_custom_product(self, x, params):
            return super().attend(query, **given(out_sharding=out_sharding))
        return attend(params, x, MatmulConfig(self.dtype, out_sharding=out_sharding))

    def _has_own_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a table has one row, which nnx broadcasts, where the layer says so, or several.

        One put in by hand may have another number of rows than the constructor was given.
        """
        if self.num_embeddings == 1:
            return shape == (1, self.features)
        return len(shape) == 2 and shape[0] != 1
