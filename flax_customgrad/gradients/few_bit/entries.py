"""The catalogue's entries of few-bit activations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.gradients.few_bit import few_bit
from flax_customgrad.registry.entry import Curve, Entry
from flax_customgrad.registry.examples import applied, normal


def _few() -> jax.Array:
    """Elements on every step, and in the last byte of a row fewer than it holds."""
    return 3 * normal(8, 2, 5)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _formula(tables: Any) -> Any:
    def formula(x: jax.Array, g: jax.Array, bits: int = 2, **_: Any) -> tuple[jax.Array]:
        borders, levels = (jnp.array(a) for a in (tables[bits].borders, tables[bits].levels))
        s = levels[jnp.searchsorted(borders, jnp.abs(x))]
        return (g * jnp.where(x < 0, 1 - s, s),)

    return formula


ENTRIES = tuple(
    Entry(
        function.__name__,
        "few_bit",
        function,
        None,
        "surrogate",
        keeps="the step that each element lies on: 1, 2 or 4 bits",
        gain="a sixteenth of the memory of float32 for a gradient that is slightly biased",
        source="arXiv:2202.00441",
        formula=_formula(tables),
        curves={
            f"{2**bits} steps": Curve(partial(function, bits=bits), -6.0, 6.0) for bits in (1, 2, 4)
        },
        examples={f"{bits} bits": applied(_few, bits=bits) for bits in (1, 2, 4)},
        workloads={"4096x1024": applied(_many)},
    )
    for function, tables in (
        (few_bit.few_bit_gelu, few_bit.GELU_TABLES),
        (few_bit.few_bit_silu, few_bit.SILU_TABLES),
    )
)
