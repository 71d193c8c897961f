"""MinGRU: a GRU whose gates do not look at the state, so that all its steps are one scan.

    forward   z_t = sigmoid(W_z x_t + b_z)
              n_t = W_n x_t + b_n
              h_t = (1 - z_t) h_{t-1} + z_t n_t
    backward  that of `linear_recurrence`, for a = 1 - z and b = z n; then those of `sigmoid` and of
              the products
    kept      x, 1 - z, z, n and h

The factors lie between 0 and 1, so nothing grows, and no logarithms are needed: the gates and the
states are in float32 (in bfloat16 a factor of 0.999 is 1). 1 - z is sigmoid(-(W_z x + b_z)), which
loses no digits.

Source: arXiv:2410.01201
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer

from flax_customgrad.layers.activation.sigmoidal import sigmoid
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.recurrent.linear_cell import LinearCell
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import in_dtype


class MinGRU(LinearCell):
    """A GRU without the state in its gates; `fcg.RNN` around it computes all steps at once.

    Attributes:
        dense_z: the `Linear` of the update gate.
        dense_n: the `Linear` of the new state.

    Args:
        in_features: size of the last axis of the inputs.
        hidden_features: size of the last axis of the states, which are the outputs.
        use_bias: whether both projections have a bias.
        dtype: dtype of the projections and of the outputs, None for the promoted one. Gates and
            states are in float32 or wider.
        param_dtype: dtype of the parameters.
        kernel_init: initializer of both kernels.
        bias_init: initializer of both biases.
        rngs: random numbers for the parameters.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> cell = fcg.MinGRU(3, 4, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 3))
        >>> bool(jnp.allclose(fcg.RNN(cell)(x), nnx.RNN(cell)(x), atol=1e-6))
        True

    Source: arXiv:2410.01201
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features

        def projection() -> Linear:
            return Linear(
                in_features,
                hidden_features,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
            )

        self.dense_z, self.dense_n = projection(), projection()

    @property
    def _carry_dtype(self) -> Any:
        return accumulator(self.dense_z.kernel[...])

    def _terms(self, x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        k, n = (in_dtype(dense(x), dtype) for dense in (self.dense_z, self.dense_n))
        return sigmoid(-k), sigmoid(k) * n

    def _output(self, h: jax.Array, x: jax.Array) -> jax.Array:
        kernel = self.dense_z.kernel[...]
        return in_dtype(h, self.dense_z.dtype or jnp.result_type(x.dtype, kernel.dtype))
