"""Einsum: an einsum of the input and a kernel, and a bias.

Written for 'nta,hab->nthb'; any equation of two operands follows the same pattern, because an
einsum is linear in each operand:

    forward   y[n,t,h,b]     = sum_a x[n,t,a] kernel[h,a,b] + bias[h,b]
    backward  dx[n,t,a]      = sum_hb g[n,t,h,b] kernel[h,a,b]
              dkernel[h,a,b] = sum_nt x[n,t,a] g[n,t,h,b]
              dbias[h,b]     = sum_nt g[n,t,h,b]
    kept      x and the parameters, as they came: no copy of the kernel in the compute dtype.

A label that only one operand has, and y has not, is summed away in the forward, so the gradient is
the same at each of its places. The sums of `dkernel` and `dbias` run in float32, and each is cast
once, to the dtype of its parameter.
"""

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import check_einsum_equation
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, given, has_custom_product, parameters
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


@dataclass(frozen=True)
class Equation:
    """An einsum equation without ellipsis: the labels of x, of the kernel and of y."""

    x: str
    kernel: str
    y: str

    @classmethod
    def parse(cls, equation: str, x_ndim: int, kernel_ndim: int) -> "Equation":
        """Reads 'nta,hab->nthb'; an ellipsis becomes labels that the equation does not use.

        Raises:
            ValueError: an operand has other axes than the equation has labels for it.
        """
        operands, y = equation.split("->")
        pairs = list(zip(operands.split(","), (x_ndim, kernel_ndim), strict=True))
        # How many axes the ellipsis of each operand stands for.
        elided = [ndim - len(labels.replace("...", "")) for labels, ndim in pairs]
        if any(n < 0 or (n and "..." not in s) for (s, _), n in zip(pairs, elided, strict=True)):
            raise ValueError(
                f"einsum {equation!r} does not fit an input of rank {x_ndim} and a kernel of rank "
                f"{kernel_ndim}"
            )
        unused = "".join(c for c in string.ascii_letters if c not in equation)[: max(elided)]
        x, kernel = (
            labels.replace("...", unused[len(unused) - n :])
            for (labels, _), n in zip(pairs, elided, strict=True)
        )
        return cls(x, kernel, y.replace("...", unused))

    @property
    def bias_axes(self) -> tuple[int, ...]:
        """The axes of y that the bias does not have: those that are no axis of the kernel."""
        return tuple(i for i, label in enumerate(self.y) if label not in self.kernel)

    def is_regular(self, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
        """Whether no operand repeats a label and each label has one size."""
        sizes: dict[str, int] = {}
        pairs = [*zip(self.x, x_shape, strict=True), *zip(self.kernel, kernel_shape, strict=True)]
        return all(sizes.setdefault(label, size) == size for label, size in pairs) and all(
            len(set(labels)) == len(labels) for labels in (self.x, self.kernel, self.y)
        )


Labelled = tuple[str, jax.Array]
"""An array, and a label for each of its axes."""


class Residuals(NamedTuple):
    """What the backward of `einsum` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    equation: Equation
    config: MatmulConfig


@custom_vjp
def einsum(params: Parameters, x: jax.Array, equation: Equation, config: MatmulConfig) -> jax.Array:
    """Computes an einsum of an input and a kernel, and adds a bias.

    Args:
        params: `kernel`, float, with an axis per label of `equation.kernel`; `bias` with as many
            elements as those axes of y that the kernel has, or no bias.
        x: inputs, float, with an axis per label of `equation.x`.
        equation: the labels; regular, see `Equation.is_regular`.
        config: dtype, precision and sharding.

    Returns:
        Array with an axis per label of `equation.y`, in the dtype of the computation.
    """
    x, kernel, bias = config.promote(x, params["kernel"], params.get("bias"))
    labels = f"{equation.x},{equation.kernel}->{equation.y}"
    y = jnp.einsum(labels, x, kernel, **config.forward_kwargs())
    if bias is None:
        return y
    return y + jnp.reshape(
        bias, [1 if i in equation.bias_axes else y.shape[i] for i in range(y.ndim)]
    )


def _fwd(
    params: Parameters, x: jax.Array, equation: Equation, config: MatmulConfig
) -> tuple[jax.Array, Residuals]:
    return einsum(params, x, equation, config), Residuals(params, x, equation, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None]:
    params, labels, precision = res.params, res.equation, res.config.precision
    x, kernel = res.config.promote(res.x, params["kernel"])
    size = dict(zip(labels.x + labels.kernel, x.shape + kernel.shape, strict=True))
    chex.assert_shape(g, tuple(size[label] for label in labels.y))
    of_x, of_kernel, of_y = (labels.x, x), (labels.kernel, kernel), (labels.y, g)
    dx = _labelled_product(
        labels.x, of_y, of_kernel, input_gradient, like=res.x, precision=precision
    )
    dkernel = _labelled_product(
        labels.kernel, of_x, of_y, parameter_gradient, like=kernel, precision=precision
    )
    chex.assert_shape([dx, dkernel], [x.shape, kernel.shape])
    grads = {"kernel": dkernel}
    if "bias" in params:
        dbias = total(g, labels.bias_axes)
        chex.assert_size(dbias, params["bias"].size)
        grads["bias"] = jnp.reshape(dbias, params["bias"].shape)
    return nnx.State(grads), dx, None, None


einsum.defvjp(_fwd, _bwd)


def _labelled_product(
    labels: str, lhs: Labelled, rhs: Labelled, gradient: Callable[..., jax.Array], **kwargs: Any
) -> jax.Array:
    """The product of two labelled arrays, summed over every label that is not in `labels`.

    It is a `dot_general` rather than an einsum, which would put the contracted axes in alphabetical
    order and copy g for it.

    Args:
        labels: a label for each axis of the result, which is laid out like the array `like`.
        lhs: the first factor.
        rhs: the second factor.
        gradient: `input_gradient` or `parameter_gradient`, which takes the product.
        **kwargs: `like` and `precision` of that.
    """
    (a, a_value), (b, b_value) = (
        _sum_unused_labels(lhs, labels + rhs[0]),
        _sum_unused_labels(rhs, labels + lhs[0]),
    )
    batch = [c for c in a if c in b and c in labels]
    contracted = [c for c in a if c in b and c not in labels]
    free = [c for c in a if c not in b] + [c for c in b if c not in a]
    numbers = [([a.index(c) for c in cs], [b.index(c) for c in cs]) for cs in (contracted, batch)]
    order = [labels.index(c) for c in batch + free]
    out = gradient(a_value, b_value, numbers, order=order, **kwargs)
    summed_away = [i for i in range(len(labels)) if i not in order]
    return jnp.broadcast_to(jnp.expand_dims(out, summed_away), kwargs["like"].shape)


def _sum_unused_labels(array: Labelled, used: str) -> Labelled:
    """An array summed over the axes whose labels nothing else uses."""
    labels, value = array
    unused = [i for i, c in enumerate(labels) if c not in used]
    return "".join(c for c in labels if c in used), total(value, unused) if unused else value


class Einsum(nnx.Einsum):
    """`nnx.Einsum` with float32 sums in its backward and no copy of the kernel kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.Einsum`. With an
    `einsum_op` or `promote_dtype` of the user's own, for integer or complex inputs, and for an
    equation that repeats a label within an operand or broadcasts an axis of size 1, the layer
    computes as nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Einsum('nta,hab->nthb', (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
    """

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array with an axis per label of the first operand.
            einsum_str: an equation that goes before that of the constructor, or None.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array with an axis per label behind the arrow.

        Raises:
            ValueError: there is no equation, or it does not fit inputs and kernel.
        """
        x, params = as_array(inputs), parameters(self, "kernel", "bias")
        equation = None
        if self.einsum_op is jnp.einsum and has_custom_product(self, x, params):
            equation = self._equation(einsum_str, x, params["kernel"])
        # nnx says what is wrong with a missing equation.
        if equation is None:
            arguments = given(einsum_str=einsum_str, out_sharding=out_sharding)
            return super().__call__(inputs, **arguments)
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return einsum(params, x, equation, config)

    def _equation(self, einsum_str: str | None, x: jax.Array, kernel: jax.Array) -> Equation | None:
        """The equation, where there is one and it is regular."""
        given = self.einsum_str if einsum_str is None else einsum_str
        if given is None:
            return None
        text = given.replace(" ", "")
        check_einsum_equation(self, text)
        equation = Equation.parse(text, x.ndim, kernel.ndim)
        return equation if equation.is_regular(x.shape, kernel.shape) else None

    def _regular_equation(
        self, einsum_str: str | None, x: jax.Array, params: Parameters
    ) -> Equation:
        """The equation, for a layer that cannot fall back to nnx where it is not regular."""
        kernel = params["kernel"]
        equation = self._equation(einsum_str, x, kernel)
        if equation is None:
            raise ValueError(
                f"{type(self).__name__}: einsum_str={einsum_str or self.einsum_str!r} must be an "
                "equation whose labels have one size each, and occur once in an operand; got "
                f"inputs of shape {x.shape} and a kernel of shape {kernel.shape}"
            )
        sizes = dict(zip(equation.kernel, kernel.shape, strict=True))
        own = tuple(sizes[label] for label in equation.y if label in sizes)
        if "bias" in params and params["bias"].size != math.prod(own):
            raise ValueError(
                f"{type(self).__name__}: the bias has shape {params['bias'].shape}, and the kernel "
                f"outputs of shape {own}: give it that shape when you replace a bias or a kernel"
            )
        return equation
