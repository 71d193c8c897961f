"""The gradient of every layer of the catalogue, under every transform."""

import pytest
from flax import nnx

from flax_customgrad import catalogue
from flax_customgrad.testing import CHECKS, check_vjp

# Layers of one operation differ in their formulas, not in what JAX's transforms make of it: for
# each operation some go through all of them. `python -m flax_customgrad check` spares none.
LINEAR = {"Linear", "Einsum", "Embed"}
NORMS = {"LayerNorm", "BatchNorm"}
ACTIVATIONS = {"gelu", "SwiGLU"}
ROWS = {"softmax"}
CONVOLUTIONS = {"Conv", "ConvTranspose"}
POOLS = {"max_pool"}
STEPS = {"clip_ste", "XNORSign"}
CODEBOOKS = {"VectorQuantizer"}
SAMPLES = {"gumbel_softmax"}
SPARSE = {"NMSparseLinear"}
QUANTIZED = {"QuantLinear"}
INT8 = {"Int8Linear"}
SPIKES = {"LIF"}
SHAPERS = {"gradient_scale", "gradient_clip"}
FEEDBACK = {"DirectFeedback"}
FROZEN = {"QLoRALinear"}
THOROUGH = (
    LINEAR
    | NORMS
    | ACTIVATIONS
    | ROWS
    | CONVOLUTIONS
    | POOLS
    | STEPS
    | SAMPLES
    | CODEBOOKS
    | SPARSE
    | QUANTIZED
    | INT8
    | SPIKES
    | SHAPERS
    | FEEDBACK
    | FROZEN
)
OF_A_SURROGATE = ("autodiff", "dtypes", "residuals")
OF_THE_EXACT = ("autodiff", "finite_differences", "second_order", "dtypes", "residuals")

# Further examples of a layer differ in its arguments.
OF_ARGUMENTS = ("autodiff", "residuals")


def checks_of(entry, nth):
    """The checks that an example goes through, and the dtypes."""
    if nth:
        return OF_ARGUMENTS, ()
    if entry.name in THOROUGH:
        return CHECKS, ("bfloat16", "float16")
    return OF_THE_EXACT if entry.gradient == "exact" else OF_A_SURROGATE, ("bfloat16",)


EXAMPLES = [
    pytest.param(entry, make, *checks_of(entry, nth), id=f"{entry.name}, {name}")
    for entry in catalogue.entries()
    for nth, (name, make) in enumerate(entry.examples.items())
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
    # Features in groups.
    ("Conv", "mesh", "Explicit axes"),
    # Running statistics of one layer for a batch of them.
    ("BatchNorm", "modes", "nnx.vmap, graph and updates"),
    ("BatchNorm", "modes", "nnx.vmap, graph"),
    ("BatchNorm", "modes", "nnx.vmap, tree"),
    # In these modes nnx.grad takes the whole Module, and codes are integers: split it first.
    *(
        (name, "modes", f"nnx.{transform}, {mode}")
        for name in FROZEN
        for transform in ("jit", "remat", "vmap", "scan")
        for mode in ("graph", "tree")
    ),
}


@pytest.mark.parametrize(("entry", "make", "checks", "dtypes"), EXAMPLES)
def test_gradient(entry, make, checks, dtypes):
    example = make(entry.module)
    formula = entry.stated(example)
    left_out = set()
    if not any(isinstance(a, nnx.Module) and nnx.state(a, nnx.Param) for a in example):
        # The modes of NNX are those of a Module's parameters.
        left_out.add("modes")
    if formula is not None:
        # A step has no slope to find by differences.
        left_out.add("finite_differences")
    checks = tuple(c for c in checks if c not in left_out)
    report = check_vjp(*example, formula=formula, checks=checks, dtypes=dtypes)
    assert {row.check for row in report.rows} == set(checks)
    skipped = {(entry.name, r.check, r.case) for r in report.rows if r.status == "skipped"}
    if formula is None:
        assert report.residual_bytes <= report.reference_residual_bytes
    else:
        # Where autodiff may not differentiate the function, JAX has no forward mode of it.
        skipped -= {(entry.name, "second_order", "jvp of grad")}
    assert skipped <= CANNOT, report
