"""The nearest code of each vector, without an array of all distances.

    |x - code|^2 = |code|^2 - 2 x.code + |x|^2

The last term is the same for every code, and the first is part of the product: the least element of
`[-2 x, 1] [code, |code|^2]^T` is that of the distances. The product is computed for a block
of codes at a time, beside a running minimum: 65536 codes and 16384 vectors need a block of 17 MB
rather than 4.3 GB of distances. Blocks are of codes and not of vectors, so that vectors that a mesh
has spread stay where they are. The last block overlaps the one before, so that the number of codes
may be any.

The place of the minimum is found by looking for its value, which XLA on a CPU vectorizes: on two
cores argmin takes 430 ms for 8192 codes of 64 and 16384 vectors, this 190, the products alone 145.

Distances are in float32 or wider, of vectors and codes divided by powers of two, so vectors with
norms of 1e30 and of 1e-30 have a nearest code too. An offset that vectors or codes have in common
is subtracted from both first: the terms above would be as large as its square, and their rounding
larger than the distances. Of codes whose distances differ by rounding alone any may be found; of
equal distances, the first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.scaling import magnitude
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes
from flax_customgrad.numerics.sizes import at_least_one, is_known

_PRODUCTS = 2**22
"""About how many products are stored at a time: 17 MB of float32."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 4096
_BLOCK_OF_UNKNOWN = 512
"""For a number of vectors that `jax.export` leaves symbolic."""


@promoting
def nearest_code(x: jax.Array, codes: jax.Array, block: int | None = None) -> jax.Array:
    """The number of the code nearest to each vector; of equally near ones the first.

    Args:
        x: array of shape (..., features), float.
        codes: array of shape (num_codes, features), float.
        block: how many codes to compare with at a time; by default so many that there are about 4
            million products, and from 64 to 4096.

    Returns:
        int32 array of shape (...). It has no gradient. A vector with an element that is infinite or
        NaN has no nearest code: its number is num_codes, which no code has.

    Raises:
        ValueError: x and codes differ in their features, or a size is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import flax_customgrad as fcg
        >>> codes = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
        >>> fcg.nearest_code(jnp.array([[0.9, 0.2], [-3.0, 0.0]]), codes)
        Array([0, 1], dtype=int32)
    """
    if codes.ndim != 2 or 0 in codes.shape or x.ndim == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"nearest_code: x has shape {x.shape} and codes {codes.shape}; write (..., features) "
            "and (num_codes, features), with at least one code and one feature"
        )
    if block is not None and block < 1:
        raise ValueError(
            f"nearest_code: block={block!r} must be a positive number of codes, or None"
        )
    vectors = at_least_one(x.size // x.shape[-1])
    if block is None:
        block = _BLOCK_OF_UNKNOWN
        if is_known(vectors):
            block = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, _PRODUCTS // vectors))
    search = functools.partial(_search, block=min(block, codes.shape[0]))
    x, codes = (lax.stop_gradient(a) for a in widened(jnp.result_type(x, codes), x, codes))
    return with_auto_axes(search, PartitionSpec(*explicit_spec(x)[: x.ndim - 1]), x, codes)


@functools.partial(jax.jit, static_argnames="block")
def _search(x: jax.Array, codes: jax.Array, block: int) -> jax.Array:
    num_codes = codes.shape[0]
    code_power = magnitude(codes, (0, 1))[0]
    x_power = jnp.maximum(magnitude(x, (-1,)), code_power)
    codes /= code_power
    offset = _common_offset(x / code_power, codes)
    codes -= offset
    code_power /= x_power
    rows = jnp.concatenate([-2 * (x / x_power - offset * code_power), code_power], -1)
    columns = jnp.concatenate([codes, jnp.sum(codes**2, -1, keepdims=True)], -1)

    def search_block(k: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(k * block, num_codes - block)
        in_block = lax.dynamic_slice_in_dim(columns, first, block)
        products = lax.dot_general(
            rows, in_block, (((x.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        least = jnp.min(products, -1, keepdims=True)
        position = lax.broadcasted_iota(jnp.int32, products.shape, x.ndim - 1)
        place = jnp.min(jnp.where(products == least, position, block), -1)
        return least[..., 0], first + place

    def step(k: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (least, index), (new_least, new_index) = best, search_block(k)
        return jnp.minimum(least, new_least), jnp.where(new_least < least, new_index, index)

    least, index = lax.fori_loop(1, -(-num_codes // block), step, search_block(0))
    return jnp.where(jnp.isnan(least), num_codes, index).astype(jnp.int32)


def _common_offset(x: jax.Array, codes: jax.Array) -> jax.Array:
    """What can be subtracted from vectors and codes; of shape (features,), 0 where there is none.

    Where vectors lie on both sides of 0 it is 0, and it lies between the codes: so neither grows by
    more than the distance between the two, and no digit is lost that the distance depends on.
    """
    finite, axes = jnp.isfinite(x), tuple(range(x.ndim - 1))
    least = jnp.min(x, axes, where=finite, initial=jnp.inf)
    largest = jnp.max(x, axes, where=finite, initial=-jnp.inf)
    return jnp.clip(jnp.clip(0, least, largest), jnp.min(codes, 0), jnp.max(codes, 0))
