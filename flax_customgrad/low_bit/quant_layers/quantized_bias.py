"""A bias in int32: multiples of the product of the steps of input and kernel.

    forward   b_q = s clip(round(b / s), -n, n),  s = s_x s_w,  n = 2^31 - 2^7
    backward  db  = g

Integer hardware adds it to the sum of products of codes, which is in these units. The gradient is
the straight-through estimator, and s is a constant. n is the largest float32 that int32 holds.

Source: arXiv:1712.05877
"""

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.residual_storage import with_derivative_of
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.scaling import quotient

_LARGEST = 2**31 - 2**7


def int32_bias(
    layer: str, bias: jax.Array, x: Codes | jax.Array, kernel: Codes | jax.Array
) -> jax.Array:
    """Quantizes a bias to int32; one of operands that are not quantized stays as it is.

    Args:
        layer: the name of the layer, for the error.
        bias: array of any shape, float.
        x: the input, with one step.
        kernel: the kernel, with one step or one for each element of the bias.

    Returns:
        Array like the bias.

    Raises:
        ValueError: there are other steps, or none.
    """
    if not (isinstance(x, Codes) and isinstance(kernel, Codes)):
        return bias
    of_x, of_kernel = (a.scheme.step(*a.parameters) for a in (x, kernel))
    if of_x is None or of_kernel is None:
        which = type((x if of_x is None else kernel).scheme).__name__
        raise ValueError(
            f'{layer}: bias="int32" needs input and kernel in steps of one size, without blocks; '
            f"what one of them is quantized by, a {which}, has no such step"
        )
    own = tuple(n for n in of_kernel.shape if n > 1), tuple(n for n in bias.shape if n > 1)
    if of_x.size != 1 or (of_kernel.size != 1 and own[0] != own[1]):
        raise ValueError(
            f'{layer}: bias="int32" needs one step for the input, and for the kernel one or one '
            f"for each output; for a bias of shape {bias.shape} they have shapes {of_x.shape} and "
            f"{of_kernel.shape}: write axis=None for the activation, and the axes of the outputs "
            "for the weight"
        )
    of_kernel = of_kernel.reshape(bias.shape if of_kernel.size > 1 else ())
    steps = widened(bias.dtype, bias, of_x.reshape(()), of_kernel)
    b, s_x, s_w = (lax.stop_gradient(a) for a in steps)
    q = jnp.clip(jnp.round(quotient(b, s_x * s_w)), -_LARGEST, _LARGEST)
    return with_derivative_of(in_dtype(q * (s_x * s_w), bias.dtype), bias)
