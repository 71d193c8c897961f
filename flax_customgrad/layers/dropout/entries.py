"""The catalogue's entries of the dropout family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.dropout.dropout import Dropout, drop, dropout
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import applied, made, normal, on_a_copy

_GAIN = (
    "a bit an element kept instead of a byte: 8 layers in a scan 134 MB -> 122; or the key alone"
)
_SOURCE = "https://jmlr.org/papers/v15/srivastava14a.html"


def _few() -> jax.Array:
    return normal(8, 1, 3, 11)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _key() -> jax.Array:
    return jax.random.key(2)


def _keeping_the_key(cls: Any) -> tuple[Any, ...]:
    """An example with an argument that the layer of nnx does not have."""
    kwargs: dict[str, Any] = {"residual": "key"} if cls is Dropout else {}
    return on_a_copy, cls(0.1, **kwargs, rngs=nnx.Rngs(0)), _many()


ENTRIES = (
    Entry(
        "Dropout",
        "dropout",
        Dropout,
        nnx.Dropout,
        "exact",
        keeps='the mask in bits, or as its `residual` says "mask" or "key"',
        gain=_GAIN,
        source=_SOURCE,
        examples={"alone": made(0.3, inputs=(_few,), call=on_a_copy)},
        workloads={
            "4096x1024": made(0.1, inputs=(_many,), call=on_a_copy),
            "4096x1024, bf16": made(
                0.1, inputs=(lambda: normal(4096, 1024, dtype=jnp.bfloat16),), call=on_a_copy
            ),
            "4096x1024, key": _keeping_the_key,
        },
    ),
    Entry(
        "dropout",
        "dropout",
        dropout,
        None,
        "exact",
        keeps='the mask in bits, or as its `residual` says "mask" or "key"',
        gain=f"{_GAIN}; a rate that may be traced",
        source=_SOURCE,
        examples={
            "shared along an axis": applied(_few, _key, 0.3, broadcast_dims=(-2,)),
            "key": applied(_few, _key, 0.3, residual="key"),
        },
        workloads={"4096x1024": applied(_many, _key, 0.1)},
        operations={drop: "shared along an axis"},
    ),
)
