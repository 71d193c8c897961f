"""The gradient of every layer of the catalogue, under every transform."""

import pytest

from flax_customgrad import catalogue
from flax_customgrad.testing import CHECKS, check_vjp

EXAMPLES = [
    pytest.param(entry, make, id=f"{entry.name}, {name}")
    for entry in catalogue.entries()
    for name, make in entry.examples.items()
]

# What JAX itself cannot do here, and so is skipped: an Explicit mesh asks jnp.take for a sharding
# that it does not take, axis 0 of that product is a batch axis of the kernel, and power iteration
# sums over split features.
CANNOT = {
    ("Embed", "mesh", "Explicit axes"),
    ("LinearGeneral", "shard_map", "check_vma=True"),
    ("LinearGeneral", "shard_map", "check_vma=False"),
    ("LinearGeneral", "mesh", "Explicit axes"),
    ("SpectralNorm", "mesh", "Explicit axes"),
    # Running statistics of one layer for a batch of them.
    ("BatchNorm", "modes", "nnx.vmap, graph and updates"),
    ("BatchNorm", "modes", "nnx.vmap, graph"),
    ("BatchNorm", "modes", "nnx.vmap, tree"),
}


@pytest.mark.parametrize(("entry", "make"), EXAMPLES)
def test_gradient(entry, make):
    report = check_vjp(*make(entry.module))
    # NNX has no modes for a function of arrays.
    expected = set(CHECKS) - {"modes"} if entry.is_function else set(CHECKS)
    assert {row.check for row in report.rows} == expected
    skipped = {(entry.name, r.check, r.case) for r in report.rows if r.status == "skipped"}
    assert skipped <= CANNOT, report
    assert report.residual_bytes <= report.reference_residual_bytes
