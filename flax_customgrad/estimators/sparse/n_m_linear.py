"""NMSparseLinear: a linear layer of which n of every m weights are used, arXiv:2102.04010.

forward   y = x W~ + b,  W~ = m W the pruned kernel of `n_m`
backward  dx = g W~^T,  dW = x^T g + decay (1 - m) W,  db = sum g
kept      x, W and b: only what the caller holds. The mask m is computed again.
"""

from typing import Any, NamedTuple

import chex
import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.sparse.n_m import (
    Pattern,
    check_pattern,
    checked_decay,
    n_m_sparsify,
)
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `sparse_linear` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    decay: Any
    pattern: Pattern
    how: MatmulConfig


@custom_vjp(surrogate=True)
def sparse_linear(
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, how: MatmulConfig
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
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, how: MatmulConfig
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
        check_pattern("NMSparseLinear", n, m, "in_features", in_features)
        checked_decay("NMSparseLinear", decay)
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
        if injected or not has_custom_backward(inputs, params):
            return self._with_sparse_kernel(inputs, out_sharding)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        decay = checked_decay("NMSparseLinear", self.decay)
        return sparse_linear(params, inputs, decay, Pattern(self.n, self.m, 0), how)

    def _with_sparse_kernel(self, inputs: jax.Array, out_sharding: Any) -> jax.Array:
        dense = self.kernel[...]
        try:
            self.kernel.set_value(self.sparse_kernel)
            return super().__call__(inputs, out_sharding)
        finally:
            self.kernel.set_value(dense)
