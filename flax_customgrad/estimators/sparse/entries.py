"""The catalogue's entries of the sparse family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.sparse.n_m import n_m_sparsify, prune
from flax_customgrad.estimators.sparse.n_m_linear import NMSparseLinear, sparse_linear
from flax_customgrad.registry.entry import Curve, Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, applied, made, normal


def _kept(w: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Which weights are kept, found by sorting each group."""
    groups = jnp.moveaxis(w, axis, -1)
    size = jnp.abs(groups).reshape(-1, m)
    place = jnp.argsort(jnp.argsort(-size, axis=-1, stable=True), axis=-1, stable=True)
    return jnp.moveaxis((place < n).reshape(groups.shape), -1, axis)


def _sr_ste(
    w: jax.Array, n: int, m: int, decay: Any, g: jax.Array, axis: int = -2
) -> tuple[Any, ...]:
    dw = g + decay * ~_kept(w, n, m, axis) * w
    return dw, None, None, None


def _linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    w = layer.kernel[...]
    kept = _kept(w, layer.n, layer.m, 0)
    grads = {"kernel": jnp.einsum("...i,...o->io", x, g) + layer.decay * ~kept * w}
    if layer.bias is not None:
        grads["bias"] = jnp.einsum("...o->o", g)
    return nnx.State(grads), jnp.einsum("...o,io->...i", g, kept * w)


def _beside_one(w: jax.Array) -> jax.Array:
    """A weight beside one of 1, of which the larger is kept."""
    pair = jnp.stack([w, jnp.ones_like(w)])
    return n_m_sparsify(pair, 1, 2, 0.2, axis=0)[0]


def _with_ties() -> jax.Array:
    """Multiples of 1/2, zeros among them, so that many weights of a group are equally large."""
    return jnp.round(2 * normal(8, 1, 6, 2)) / 2


def _rounded_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.round(2 * jax.random.normal(key, shape, dtype)) / 4


ENTRIES = (
    Entry(
        "n_m_sparsify",
        "sparse",
        n_m_sparsify,
        None,
        "surrogate",
        keeps="w",
        gain="N:M sparsity with the SR-STE gradient; exactly N of M, also at ties",
        source="arXiv:2102.04010",
        formula=_sr_ste,
        curves={"beside a weight of 1, decay 0.2": Curve(_beside_one)},
        examples={
            "2 of 3 with ties, 4-D, a traced decay": applied(
                _with_ties, 2, 3, lambda: jnp.float32(0.1)
            ),
            "2 of 4, first axis": applied(lambda: normal(8, 6), 2, 4, 0.1, axis=0),
        },
        operations={prune: "2 of 3 with ties, 4-D, a traced decay"},
        workloads={"4096x1024": applied(lambda: normal(4096, 1024), 2, 4, 2e-4)},
    ),
    Entry(
        "NMSparseLinear",
        "sparse",
        NMSparseLinear,
        None,
        "surrogate",
        keeps="x, kernel",
        gain="N:M sparsity with the SR-STE gradient, and nothing kept beyond Linear",
        source="arXiv:2102.04010",
        formula=_linear,
        examples={
            "2 of 4 with ties, bias, two batch axes of which one is 1": made(
                12,
                6,
                decay=0.1,
                kernel_init=_rounded_init,
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 1, 12),),
            ),
            "1 of 3, no bias, two batch axes": made(
                6, 4, n=1, m=3, decay=0.1, use_bias=False, inputs=(lambda: normal(8, 2, 6),)
            ),
        },
        operations={sparse_linear: "2 of 4 with ties, bias, two batch axes of which one is 1"},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
)
