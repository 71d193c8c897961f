"""NMSparseLinear: a linear layer of which n of every m weights are used.

    forward   pruned  = mask kernel                                  mask: that of `n_m`
              y       = x pruned + bias
    backward  dx      = g pruned^T
              dpruned = x^T g
              dkernel = dpruned + decay (1 - mask) kernel
              dbias   = sum g
    kept      x, kernel and bias: only what the caller holds. The mask is computed again.

Source: arXiv:2102.04010
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.sparse.n_m import (
    Pattern,
    check_decay,
    check_pattern,
    n_m_sparsify,
)
from flax_customgrad.estimators.sparse.n_m_kernel import NMKernel
from flax_customgrad.layers.drop_in import (
    Parameters,
    given,
    has_custom_product,
    has_own_bias,
    parameters,
)
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.packed_weights import PackableKernel
from flax_customgrad.layers.replaced_matmul import adopted
from flax_customgrad.layers.stacked import Index
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `sparse_linear` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    decay: Any
    pattern: Pattern
    config: MatmulConfig


@custom_vjp(surrogate=True)
def sparse_linear(
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, config: MatmulConfig
) -> jax.Array:
    """Applies a linear map with a pruned kernel over the last axis.

    Args:
        params: `kernel` of shape (in_features, out_features), float; `bias` of shape
            (out_features,), or no bias.
        x: inputs of shape (..., in_features), float.
        decay: the decay in the backward, a number or an array without axes.
        pattern: which weights of the kernel are kept.
        config: dtype, precision and sharding.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    pruned = pattern.prune(params["kernel"])
    return linear(nnx.State({**params, "kernel": pruned}), x, config)


def _fwd(
    params: Parameters, x: jax.Array, decay: Any, pattern: Pattern, config: MatmulConfig
) -> tuple[jax.Array, Residuals]:
    y = sparse_linear(params, x, decay, pattern, config)
    return y, Residuals(params, x, decay, pattern, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    params, pattern, config = res.params, res.pattern, res.config
    kernel = params["kernel"]
    x, pruned = config.promote(res.x, pattern.prune(kernel))
    dims = chex.Dimensions(I=kernel.shape[0], O=kernel.shape[1])
    batch, rows, last = x.shape[:-1], tuple(range(g.ndim - 1)), g.ndim - 1
    chex.assert_shape([x, g], [(*batch, *dims["I"]), (*batch, *dims["O"])])
    over_o, over_rows = (((last,), (1,)), ((), ())), ((rows, rows), ((), ()))
    dx = input_gradient(g, pruned, over_o, like=res.x, precision=config.precision)
    dpruned = parameter_gradient(x, g, over_rows, like=kernel, precision=config.precision)
    dkernel = pattern.sr_ste(dpruned, kernel, res.decay)
    chex.assert_shape([dx, dkernel], [x.shape, dims["IO"]])
    grads = {"kernel": dkernel}
    if "bias" in params:
        dbias = grads["bias"] = total(g, rows)
        chex.assert_shape([dbias, params["bias"]], dims["O"])
    return nnx.State(grads), dx, None, None, None


sparse_linear.defvjp(_fwd, _bwd)


class NMSparseLinear(Linear, PackableKernel):
    """`Linear` with N:M sparsity: of every m consecutive weights of an output, n are used.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is dense, and pruned in each call. `sparse_kernel` is the one to deploy; `pack` puts the
    weights that are kept in its place. Where `Linear`
    leaves the product to nnx, for a `dot_general` of the user's own or a bias of another shape, so
    does this one: JAX differentiates that, with the same gradient of the pruning.

    Attributes:
        n: how many of every m weights along the inputs are used.
        m: how many weights make a group.
        decay: how strongly the others are pulled to zero; a number, an array or a Variable.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.NMSparseLinear(8, 3, n=2, m=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 8))).shape
        (16, 3)
        >>> (layer.sparse_kernel != 0).sum(0)
        Array([4, 4, 4], dtype=int32)

    Source: arXiv:2102.04010
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        n: int = 2,
        m: int = 4,
        decay: Any = 2e-4,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs, a multiple of m.
            out_features: size of the last axis of the outputs.
            use_bias: whether to add a bias.
            dtype: dtype of the computation; by default inferred from inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: `jax.lax.Precision` of every product, forward and backward.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            dot_general: an operation that replaces `lax.dot_general` in the forward.
            promote_dtype: an operation that replaces nnx's promotion of dtypes.
            preferred_element_type: dtype of the forward product's result.
            rngs: random numbers for the parameters.
            kernel_metadata: metadata of the kernel's Variable, such as its sharding.
            bias_metadata: metadata of the bias's Variable.
            n: how many of every m weights are used.
            m: how many weights make a group.
            decay: as for `n_m_sparsify`.

        Raises:
            ValueError: `n` is not from 1 to m, m does not divide `in_features`, or the decay is
                negative or not finite.
        """
        check_pattern("NMSparseLinear", n, m, "in_features", in_features)
        check_decay("NMSparseLinear", decay)
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.n = n
        self.m = m
        self.decay = decay

    @classmethod
    def from_layer(cls, layer: nnx.Linear, *, n: int = 2, m: int = 4, decay: Any = 2e-4) -> Self:
        """Turns a linear layer into one that is pruned, in place: the large weights are used.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear`, trained or not.
            n: as for the constructor.
            m: as for the constructor.
            decay: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Linear`, or computes something else.
            ValueError: as for the constructor, or an operation is injected.
        """
        check_pattern(cls.__name__, n, m, "in_features", layer.in_features)
        check_decay(cls.__name__, decay)
        with adopted(cls, layer, nnx.Linear) as sparse:
            sparse.n, sparse.m, sparse.decay = n, m, decay
        return sparse

    @property
    def sparse_kernel(self) -> jax.Array:
        """The kernel that is used, of shape (in_features, out_features), zeros included."""
        if self.is_packed:
            return self.kernel[...]
        return n_m_sparsify(self.kernel[...], self.n, self.m, self.decay, axis=0)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        if self.is_packed:
            return super().__call__(inputs, **given(out_sharding=out_sharding))
        x, params = as_array(inputs), parameters(self, "kernel", "bias")
        if (
            self.dot_general is not lax.dot_general
            or not has_own_bias(self, params, params["kernel"].shape[1:])
            or not has_custom_product(self, x, params)
        ):
            return self._with_sparse_kernel(inputs, out_sharding)
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        decay = check_decay("NMSparseLinear", self.decay)
        return sparse_linear(params, x, decay, Pattern(self.n, self.m, 0), config)

    def _pack_one(self, index: Index) -> NMKernel:
        pattern = Pattern(self.n, self.m, 0)
        return NMKernel(type(self).__name__, self.kernel[index], self.kernel, pattern)

    def _with_sparse_kernel(self, inputs: jax.Array, out_sharding: Any) -> jax.Array:
        dense = self.kernel[...]
        try:
            self.kernel.set_value(self.sparse_kernel)
            return super().__call__(inputs, out_sharding)
        finally:
            self.kernel.set_value(dense)
