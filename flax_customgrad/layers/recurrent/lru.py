"""LRU: the linear recurrent unit, a diagonal of complex factors within the unit circle.

    forward   lambda = exp(-exp(nu) + i exp(theta))
              h_t    = lambda h_{t-1} + gamma (B x_t)
              y_t    = Re(C h_t) + D x_t
    backward  that of `linear_recurrence`, for a = lambda and b = gamma (B x); the rest is composed
    kept      x, B x, and h

However nu and theta are trained, |lambda| < 1. It starts uniform on the ring from `r_min` to
`r_max`, and gamma at sqrt(1 - |lambda|^2), which gives states the size of the inputs. B and C are
real kernels: columns of B, and rows of C, for the real parts and then for the imaginary ones, which
in C have a minus. States are in complex64, or complex128.

Source: arXiv:2303.06349
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.recurrent.linear_cell import LinearCell
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_size


class LRU(LinearCell):
    """The linear recurrent unit; `fcg.RNN` around it computes all steps at once.

    Attributes:
        nu_log: `nu`, of shape (hidden_features,).
        theta_log: `theta`, likewise.
        gamma_log: the logarithm of gamma, likewise.
        B: the `Linear` of the input, with a kernel of shape (in_features, 2 hidden_features).
        C: that of the states, with a kernel of shape (2 hidden_features, in_features).
        D: the factors of the input in the output, of shape (in_features,).

    Args:
        in_features: size of the last axis of the inputs and the outputs.
        hidden_features: size of the last axis of the states.
        r_min: least |lambda| to start with, from 0 to 1.
        r_max: largest |lambda| to start with, above `r_min` and at most 1.
        max_phase: largest angle of lambda to start with, in radians.
        dtype: dtype of B, C, D and the outputs, None for the promoted one.
        param_dtype: dtype of the parameters.
        rngs: random numbers for the parameters.

    Raises:
        ValueError: a number of features is below 1, or `r_min`, `r_max` or `max_phase` is out of
            its range.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rnn = fcg.RNN(fcg.LRU(3, 8, r_min=0.9, r_max=0.999, rngs=nnx.Rngs(0)))
        >>> rnn(jnp.ones((2, 5, 3))).shape
        (2, 5, 3)

    Source: arXiv:2303.06349
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"LRU: 0 <= r_min < r_max <= 1 is needed, got {r_min} and {r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"LRU: max_phase={max_phase} must be above 0 and at most 2 pi")
        in_features = check_size("LRU", "in_features", in_features)
        hidden_features = check_size("LRU", "hidden_features", hidden_features)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        tiny = 1e-4  # away from the logarithms of 0
        shape = (hidden_features,)
        place, turn = (
            jax.random.uniform(rngs.params(), shape, param_dtype, tiny, 1 - tiny) for _ in range(2)
        )
        squared = place * (r_max**2 - r_min**2) + r_min**2
        self.nu_log = nnx.Param(jnp.log(-jnp.log(squared) / 2))
        self.theta_log = nnx.Param(jnp.log(max_phase * turn))
        self.gamma_log = nnx.Param(jnp.log1p(-squared) / 2)

        def projection(n_in: int, n_out: int, deviation: float) -> Linear:
            return Linear(
                n_in,
                n_out,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(deviation),
                rngs=rngs,
            )

        self.B = projection(in_features, 2 * hidden_features, (2 * in_features) ** -0.5)
        self.C = projection(2 * hidden_features, in_features, hidden_features**-0.5)
        self.D = nnx.Param(jax.random.normal(rngs.params(), (in_features,), param_dtype))

    @property
    def _carry_dtype(self) -> Any:
        return jnp.result_type(accumulator(self.nu_log[...]), jnp.complex64)

    def _terms(self, x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        real = jnp.finfo(dtype).dtype
        nu, theta, gamma = (
            jnp.exp(p[...].astype(real)) for p in (self.nu_log, self.theta_log, self.gamma_log)
        )
        size = jnp.exp(-nu)
        terms = gamma * jnp.stack(jnp.split(self.B(x).astype(real), 2, axis=-1))
        return lax.complex(size * jnp.cos(theta), size * jnp.sin(theta)), lax.complex(*terms)

    def _output(self, h: jax.Array, x: jax.Array) -> jax.Array:
        dtype = self.dtype or jnp.result_type(x.dtype, self.D[...].dtype)
        parts = jnp.concatenate([jnp.real(h), jnp.imag(h)], axis=-1)
        return self.C(parts.astype(dtype)) + self.D[...].astype(dtype) * x.astype(dtype)
