"""N:M sparsity: of every M consecutive weights the N largest, with the SR-STE gradient.

    forward   mask = 1 for the n largest |w| of every m along an axis, 0 elsewhere
              y    = mask w
    backward  dw   = g + decay (1 - mask) w
    kept      w, which the caller holds. The mask is computed again, by m comparisons a weight;
              kept it would take a byte for each.
    at a tie  the lower index comes first: exactly n of m are kept
    NaN       is always kept, so that it is seen

Every weight gets the gradient of the sparse product, which passes straight through the mask, so a
pruned weight can grow back. The decay pulls pruned weights to zero under gradient descent, and
keeps the mask from changing back and forth: the sparse-refined straight-through estimator, SR-STE.

The decay does not depend on `g`. It is added once in each backward of the weights: twice if they
are used twice, and under vmap and shard_map with shared weights once for each example or device.

Source: arXiv:2102.04010
"""

import operator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import as_array, is_python_number
from flax_customgrad.numerics.sharding import explicit_sharding


class Pattern(NamedTuple):
    """N of every M along an axis; M divides the axis."""

    n: int
    m: int
    axis: int

    def mask(self, w: jax.Array) -> jax.Array:
        """Which weights are kept, an array of bool like `w`."""
        axis, sharding = self.axis % w.ndim, explicit_sharding(jax.typeof(w))
        magnitudes = _split_into_groups(jnp.abs(w), axis, self.m, sharding)
        # Along axis + 1 the weight itself, along axis + 2 the others of its group.
        own, others = (jnp.expand_dims(magnitudes, axis + i) for i in (2, 1))
        shape = (self.m, self.m, *(1,) * (w.ndim - axis - 1))
        is_earlier = jnp.tri(self.m, k=-1, dtype=bool).reshape(shape)
        is_ahead = (others > own) | ((others == own) & is_earlier)
        return lax.reshape(jnp.sum(is_ahead, axis + 2) < self.n, w.shape, out_sharding=sharding)

    def prune(self, w: jax.Array) -> jax.Array:
        """`y`: the weights that are kept, 0 elsewhere."""
        return jnp.where(self.mask(w), w, 0)

    def sr_ste(self, g: jax.Array, w: jax.Array, decay: Any) -> jax.Array:
        """`dw`: the gradient of the weights, from that of the pruned ones."""
        chex.assert_equal_shape([g, w])
        chex.assert_rank(decay, 0)
        dtype = accumulator(g, w)
        return g.astype(dtype) + jnp.where(self.mask(w), 0, decay * w.astype(dtype))


def _split_into_groups(
    w: jax.Array, axis: int, m: int, sharding: NamedSharding | None
) -> jax.Array:
    """Splits an axis into groups of m; where devices split groups, each takes the whole axis."""
    shape = (*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1 :])
    if sharding is not None:
        whole = sharding.shard_shape(w.shape)[axis] % m == 0
        spec = [*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :]]
        spec[axis] = spec[axis] if whole else None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return lax.reshape(w, shape, out_sharding=sharding)


class Residuals(NamedTuple):
    """What the backward of `prune` keeps: only what the caller holds anyway."""

    w: jax.Array
    decay: Any
    pattern: Pattern


@custom_vjp(surrogate=True)
def prune(w: jax.Array, decay: Any, pattern: Pattern) -> jax.Array:
    """Prunes weights.

    Args:
        w: weights of any shape, float.
        decay: the decay in the backward, a number or an array without axes.
        pattern: which weights are kept.

    Returns:
        Array like `w`.
    """
    return pattern.prune(w)


def _fwd(w: jax.Array, decay: Any, pattern: Pattern) -> tuple[jax.Array, Residuals]:
    return prune(w, decay, pattern), Residuals(w, decay, pattern)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    dw = res.pattern.sr_ste(g, res.w, res.decay)
    chex.assert_equal_shape([dw, g])
    return dw, None, None


prune.defvjp(_fwd, _bwd)


def n_m_sparsify(
    w: jax.Array, n: int = 2, m: int = 4, decay: Any = 2e-4, *, axis: int = -2
) -> jax.Array:
    """Keeps the n largest of every m weights, with the SR-STE gradient.

    Args:
        w: weights of any shape, float.
        n: how many of a group are kept.
        m: how many make a group.
        decay: how strongly pruned weights are pulled to zero, per step of gradient descent and unit
            of learning rate: 0 or more, a number or an array without axes, which may be traced.
            2e-4 is that of the paper, 0 is the plain straight-through estimator.
        axis: the axis along which the groups lie; by default the last but one, that of the inputs
            in kernels of Linear and Conv.

    Returns:
        Array like `w`; NaN is kept in addition to the n largest.

    Raises:
        TypeError: the weights are not floating.
        ValueError: `n` is not from 1 to m, m does not divide the size of the axis, there is no such
            axis, or the decay is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> w = jnp.array([[1.0], [-3.0], [2.0], [-2.0]])
        >>> fcg.n_m_sparsify(w, 2, 4).T
        Array([[ 0., -3.,  2.,  0.]], dtype=float32)
        >>> jax.grad(lambda w: fcg.n_m_sparsify(w, 2, 4, 0.1).sum())(w).T
        Array([[1.1, 1. , 1. , 0.8]], dtype=float32)

    Source: arXiv:2102.04010
    """
    w = jnp.asarray(as_array(w))
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"n_m_sparsify: the weights are {w.dtype}; expected a floating dtype")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"n_m_sparsify: axis={axis} is not an axis of weights of shape {w.shape}")
    check_pattern("n_m_sparsify", n, m, f"the size of axis {axis}", w.shape[axis])
    return prune(w, check_decay("n_m_sparsify", decay), Pattern(n, m, axis))


def check_pattern(name: str, n: int, m: int, what: str, size: int) -> None:
    """Checks that n of every m weights can be kept along an axis.

    Args:
        name: the layer, for the error.
        n: how many of a group are kept.
        m: how many make a group.
        what: the name of the size, for the error.
        size: the size of the axis.

    Raises:
        ValueError: `n` is not from 1 to m, or m does not divide the size.
    """
    if not 1 <= operator.index(n) <= operator.index(m):
        raise ValueError(f"{name}: n={n} of every m={m} weights; expected 1 <= n <= m")
    if size % m:
        raise ValueError(
            f"{name}: {what}, {size}, does not divide into groups of m={m}: expected a multiple"
        )


def check_decay(name: str, decay: Any) -> Any:
    """Checks a decay, and makes it a number or an array of JAX.

    Args:
        name: the layer, for the error.
        decay: a number or an array without axes; a traced one is not checked.

    Raises:
        ValueError: the decay is negative, or not finite.
    """
    decay = decay if is_python_number(decay) else jnp.asarray(as_array(decay))
    if not is_traced(decay) and not 0 <= decay < float("inf"):
        raise ValueError(f"{name}: decay={decay!r} must be 0 or more, and finite")
    return decay
