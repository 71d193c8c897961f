"""Interception: whether a program has put products of its own in the place of those of JAX.

Quantization libraries such as qwix replace `jax.lax.dot_general` and its like while a model runs,
the function in its module or the code in the function, to quantize forward and backward. Inside a
layer with a hand-written backward theirs would be lost without a word.
"""

import inspect
from typing import Any

import jax.numpy as jnp
from jax import lax


def products_are_intercepted() -> bool:
    """Whether JAX's matrix product, einsum or convolution is not its own at the moment."""
    return any(
        getattr(module, function.__name__) is not function or _code(function) is not code
        for module, function, code in _PRODUCTS
    )


def _code(function: Any) -> Any:
    return inspect.unwrap(function).__code__


_PRODUCTS = [
    (module, function, _code(function))
    for module, function in (
        (lax, lax.dot_general),
        (lax, lax.conv_general_dilated),
        (jnp, jnp.einsum),
    )
]
"""Each product as JAX defines it: where it is looked up, the function, and its code."""
