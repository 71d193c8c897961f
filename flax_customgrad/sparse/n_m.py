"""N:M sparsity: of every M consecutive weights the N largest, with the SR-STE gradient.

    mask      m  = 1 for the N largest |W| of every M along the input axis, 0 elsewhere
    forward   W~ = m W
    backward  dW = g + decay (1 - m) W

    NMSparseLinear   y = x W~ + b,  dx = g W~^T,  dW = x^T g + decay (1 - m) W,  db = sum g
    kept             W, and of the layer x and b: only what the caller holds. m is computed again,
                     by M comparisons a weight; a mask would take a byte for each.
    at a tie         the lower index is taken first: exactly N of M are kept
    not a number     is always kept, so that it is seen

Every weight gets the gradient of the sparse product, which passes straight through the mask, so a
pruned weight can grow back. What is added pulls pruned weights to zero under gradient descent and
keeps the mask from changing to and fro: the sparse-refined straight-through estimator, SR-STE.
Source: Zhou et al. 2021, arXiv:2102.04010.

The decay does not depend on g. It comes once with each backward of the weights: twice if they are
used twice, and under vmap and shard_map with shared weights once for each example or device.
"""

import operator
from typing import Any, NamedTuple

import chex
import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_customgrad.arithmetic import (
    Arithmetic,
    explicit_sharding,
    input_gradient,
    parameter_gradient,
)
from flax_customgrad.arrays import as_array, is_number
from flax_customgrad.contract import custom_vjp
from flax_customgrad.drop_in import Parameters, applies, parameters
from flax_customgrad.linear.linear import Linear, linear
from flax_customgrad.sums import accumulator, total


class Pattern(NamedTuple):
    """N of every M along an axis; M divides the axis."""

    n: int
    m: int
    axis: int

    def mask(self, w: jax.Array) -> jax.Array:
        """Which weights are kept, an array of bool like w."""
        axis, sharding = self.axis % w.ndim, explicit_sharding(jax.typeof(w))
        size = _grouped(jnp.abs(w), axis, self.m, sharding)
        # Along axis + 1 the weight that is judged, along axis + 2 the others of its group.
        one, other = jnp.expand_dims(size, axis + 2), jnp.expand_dims(size, axis + 1)
        shape = (self.m, self.m, *(1,) * (w.ndim - axis - 1))
        earlier = jnp.tri(self.m, k=-1, dtype=bool).reshape(shape)
        ahead = (other > one) | ((other == one) & earlier)
        return lax.reshape(jnp.sum(ahead, axis + 2) < self.n, w.shape, out_sharding=sharding)

    def prune(self, w: jax.Array) -> jax.Array:
        """The weights that are kept, 0 elsewhere."""
        return jnp.where(self.mask(w), w, 0)

    def refine(self, g: jax.Array, w: jax.Array, decay: Any) -> jax.Array:
        """The gradient of the weights, from that of the pruned ones."""
        dtype = accumulator(g, w)
        chex.assert_equal_shape([g, w])
        return g.astype(dtype) + jnp.where(self.mask(w), 0, decay * w.astype(dtype))


def _grouped(w: jax.Array, axis: int, m: int, sharding: NamedSharding | None) -> jax.Array:
    """Splits an axis into groups of m; where devices split groups, each takes the whole axis."""
    shape = (*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1 :])
    if sharding is not None:
        whole = sharding.shard_shape(w.shape)[axis] % m == 0
        spec = [*sharding.spec[: axis + 1], None, *sharding.spec[axis + 1 :]]
        spec[axis] = spec[axis] if whole else None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return lax.reshape(w, shape, out_sharding=sharding)


@custom_vjp(surrogate=True)
def prune(w: jax.Array, decay: Any, pattern: Pattern) -> jax.Array:
    """Prunes weights.

    Args:
        w: weights of any shape, float.
        decay: of the backward, a number or an array without axes.
        pattern: which weights are kept.

    Returns:
        Array like w.
    """
    return pattern.prune(w)


def _prune_fwd(w: jax.Array, decay: Any, pattern: Pattern) -> tuple[jax.Array, tuple[Any, ...]]:
    return prune(w, decay, pattern), (w, decay, pattern)


def _prune_bwd(res: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, None, None]:
    w, decay, pattern = res
    return pattern.refine(g, w, decay), None, None


prune.defvjp(_prune_fwd, _prune_bwd)


class Residuals(NamedTuple):
    """What the backward of `sparse_linear` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    decay: Any
    pattern: Pattern
    how: Arithmetic


@custom_vjp(surrogate=True)
def sparse_linear(
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, how: Arithmetic
) -> jax.Array:
    """Applies a linear map with a pruned kernel over the last axis.

    Args:
        params: `kernel` of shape (in_features, out_features), float; `bias` of shape
            (out_features,), or no bias.
        x: inputs of shape (..., in_features), float.
        decay: of the backward, a number or an array without axes.
        pattern: which weights of the kernel are kept.
        how: dtype, precision and sharding.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    return linear(nnx.State({**params, "kernel": pattern.prune(params["kernel"])}), x, how)


def _fwd(
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, how: Arithmetic
) -> tuple[jax.Array, Residuals]:
    y = sparse_linear(params, x, decay, pattern, how)
    return y, Residuals(params, x, decay, pattern, how)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, pattern, how = res.params, res.pattern, res.how
    w = params["kernel"]
    x, pruned = how.promote(res.x, pattern.prune(w))
    rows, last = tuple(range(g.ndim - 1)), g.ndim - 1
    p = how.precision
    dx = input_gradient(g, pruned, (((last,), (1,)), ((), ())), like=res.x, precision=p)
    dpruned = parameter_gradient(x, g, ((rows, rows), ((), ())), like=w, precision=p)
    chex.assert_equal_shape([dx, x])
    grads = {"kernel": pattern.refine(dpruned, w, res.decay)}
    if "bias" in params:
        grads["bias"] = total(g, rows)
        chex.assert_equal_shape([grads["bias"], params["bias"]])
    return nnx.State(grads), dx, None, None, None


sparse_linear.defvjp(_fwd, _bwd)


def n_m_sparsify(
    w: jax.Array, n: int = 2, m: int = 4, decay: Any = 2e-4, *, axis: int = -2
) -> jax.Array:
    """Keeps the n largest of every m weights, with the SR-STE gradient of arXiv:2102.04010.

    Args:
        w: weights of any shape, float.
        n: how many of a group are kept.
        m: how many make a group.
        decay: what pulls the pruned weights to zero, per step of gradient descent and unit of
            learning rate: 0 or more, a number or an array without axes, which may be traced. The
            paper's 2e-4 is the default, 0 is the plain straight-through estimator.
        axis: the axis along which the groups lie; that of the inputs, in kernels of Linear and
            Conv the last but one.

    Returns:
        Array like w; NaN is kept beside the n largest.

    Raises:
        TypeError: the weights are not floating.
        ValueError: not 1 <= n <= m; m does not divide the axis; the decay is negative.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> w = jnp.array([[1.0], [-3.0], [2.0], [-2.0]])
        >>> fcg.n_m_sparsify(w, 2, 4).T
        Array([[ 0., -3.,  2.,  0.]], dtype=float32)
        >>> jax.grad(lambda w: fcg.n_m_sparsify(w, 2, 4, 0.1).sum())(w).T
        Array([[1.1, 1. , 1. , 0.8]], dtype=float32)
    """
    w = jnp.asarray(as_array(w))
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"n_m_sparsify: the weights are {w.dtype}; expected a floating dtype")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"n_m_sparsify: axis={axis} is not an axis of weights of shape {w.shape}")
    _check("n_m_sparsify", n, m, f"the size of axis {axis}", w.shape[axis])
    return prune(w, _checked_decay("n_m_sparsify", decay), Pattern(n, m, axis))


def _check(name: str, n: int, m: int, what: str, size: int) -> None:
    if not 1 <= operator.index(n) <= operator.index(m):
        raise ValueError(f"{name}: n={n} of every m={m} weights; expected 1 <= n <= m")
    if size % m:
        raise ValueError(
            f"{name}: {what}, {size}, does not divide into groups of m={m}: expected a multiple"
        )


def _checked_decay(name: str, decay: Any) -> Any:
    decay = decay if is_number(decay) else jnp.asarray(as_array(decay))
    if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < float("inf"):
        raise ValueError(f"{name}: decay={decay!r} must be 0 or more, and finite")
    return decay


class NMSparseLinear(Linear):
    """`Linear` with N:M sparsity: of every m weights that meet in an output, n are used.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is dense, and pruned in each call. `sparse_kernel` is the one to deploy. With a
    `dot_general` or `promote_dtype` of the user's own, and for integer or complex inputs, nnx
    computes the product and JAX differentiates that, with the same gradient of the pruning.
    Its source is arXiv:2102.04010.

    Attributes:
        n: how many of every m weights along the inputs are used.
        m: how many weights make a group.
        decay: what pulls the others to zero; a number, an array or a Variable.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.NMSparseLinear(8, 3, n=2, m=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 8))).shape
        (16, 3)
        >>> (layer.sparse_kernel != 0).sum(0)
        Array([4, 4, 4], dtype=int32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int = 2,
        m: int = 4,
        decay: Any = 2e-4,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs, a multiple of m.
            out_features: size of the last axis of the outputs.
            n: how many of every m weights are used.
            m: how many weights make a group.
            decay: as for `n_m_sparsify`.
            rngs: random numbers for the parameters.
            **linear: what else `nnx.Linear` takes: use_bias, dtype, param_dtype, kernel_init and
                so on.

        Raises:
            ValueError: not 1 <= n <= m; m does not divide in_features; the decay is negative.
        """
        _check("NMSparseLinear", n, m, "in_features", in_features)
        _checked_decay("NMSparseLinear", decay)
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        self.n = n
        self.m = m
        self.decay = decay

    @property
    def sparse_kernel(self) -> jax.Array:
        """The kernel that is used, of shape (in_features, out_features), zeros included."""
        return n_m_sparsify(self.kernel[...], self.n, self.m, self.decay, axis=0)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        injected = (
            self.dot_general is not lax.dot_general
            or self.promote_dtype is not dtypes.promote_dtype
        )
        params = parameters(self, "kernel", "bias")
        if injected or not applies(inputs, params):
            return self._with_sparse_kernel(inputs, out_sharding)
        how = Arithmetic(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        decay = _checked_decay("NMSparseLinear", self.decay)
        return sparse_linear(params, inputs, decay, Pattern(self.n, self.m, 0), how)

    def _with_sparse_kernel(self, inputs: jax.Array, out_sharding: Any) -> jax.Array:
        dense = self.kernel[...]
        try:
            self.kernel.set_value(self.sparse_kernel)
            return super().__call__(inputs, out_sharding)
        finally:
            self.kernel.set_value(dense)
