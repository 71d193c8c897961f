"""The gradient of every layer of the catalogue; of every operation, under every transform."""

import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_customgrad import catalogue
from flax_customgrad.contract.arguments import pack_tree
from flax_customgrad.registry.operations import OPERATIONS
from flax_customgrad.testing import CHECKS, check_vjp, forward_mode

# Layers of one operation differ in their formulas, not in what JAX's transforms make of it: each
# operation has one thorough example, which goes through all of them, and the first example of every
# other layer goes through its formula. What a layer has beyond that differs in its arguments.
# The transforms are most of the time of all tests, so half of the operations meet them on one of
# the two software stacks, and half on the other. `python -m flax_customgrad check` spares none.
OF_A_SURROGATE = ("autodiff", "dtypes", "residuals")
OF_THE_EXACT = ("autodiff", "finite_differences", "second_order", "dtypes", "residuals")
OF_ARGUMENTS = ("jit", "residuals")
# Loops over time, chunks, tiles and blocks compile for a minute under all checks. These are the
# ones in which they differ from others; the rest is for `python -m flax_customgrad check`.
OF_A_LOOP = ("autodiff", "vmap", "remat", "second_order", "forward_mode", "dtypes", "residuals")
LOOPS = {
    "Reversible",
    "RNN",
    "ctc_loss",
    "dot_product_attention",
    "linear_cross_entropy",
    "linear_recurrence",
}

THOROUGH = {
    operation: (entry, name)
    for entry in catalogue.entries()
    for operation, name in entry.operations.items()
}
IS_SECOND_STACK = sys.version_info >= (3, 12)
HERE = {(entry.name, name) for entry, name in list(THOROUGH.values())[IS_SECOND_STACK::2]}
MISSING = sorted(name for name, operation in OPERATIONS.items() if operation not in THOROUGH)
if MISSING:
    raise pytest.UsageError(
        f"no thorough example for {', '.join(MISSING)}: name one in `operations=` of an entry, "
        "Entry(..., examples={'all of it': ...}, operations={operation: 'all of it'})"
    )


def checks_of(entry, nth, name):
    """The checks that an example goes through, and the dtypes."""
    if name in entry.operations.values() and (entry.name, name) in HERE:
        if entry.name in LOOPS:
            return OF_A_LOOP, ("bfloat16",)
        return CHECKS, ("bfloat16", "float16")
    if nth and name not in entry.operations.values():
        return OF_ARGUMENTS, ()
    return OF_THE_EXACT if entry.gradient == "exact" else OF_A_SURROGATE, ("bfloat16",)


EXAMPLES = [
    pytest.param(
        *(entry, make, *checks_of(entry, nth, name)),
        id=f"{entry.name}, {name}",
        marks=[pytest.mark.every_stack] if (entry.name, name) in HERE else [],
    )
    for entry in catalogue.entries()
    for nth, (name, make) in enumerate(entry.examples.items())
]

# What JAX itself cannot do here, and so is skipped: an Explicit mesh asks jnp.take for a sharding
# that it does not take, and power iteration sums over split features.
FROZEN = {"NF4Linear", "QLoRALinear"}
CANNOT = {
    ("Embed", "mesh", "Explicit axes"),
    ("SpectralNorm", "mesh", "Explicit axes"),
    # Features in groups.
    ("Conv", "mesh", "Explicit axes"),
    # Running statistics of one layer for a batch of them.
    ("BatchNorm", "modes", "nnx.vmap, graph and updates"),
    ("BatchNorm", "modes", "nnx.vmap, graph"),
    ("BatchNorm", "modes", "nnx.vmap, tree"),
    ("InvertibleBatchNormAct", "modes", "nnx.vmap, graph and updates"),
    ("InvertibleBatchNormAct", "modes", "nnx.vmap, graph"),
    ("InvertibleBatchNormAct", "modes", "nnx.vmap, tree"),
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
    expected = catalogue.expected(entry, example)
    left_out = set()
    if not any(isinstance(a, nnx.Module) and nnx.state(a, nnx.Param) for a in example):
        # The modes of NNX are those of a Module's parameters.
        left_out.add("modes")
    if "formula" in expected:
        # A step has no slope to find by differences.
        left_out.add("finite_differences")
    checks = tuple(c for c in checks if c not in left_out)
    report = check_vjp(*example, **expected, checks=checks, dtypes=dtypes)
    assert {row.check for row in report.rows} == set(checks)
    skipped = {(entry.name, r.check, r.case) for r in report.rows if r.status == "skipped"}
    if "formula" in expected:
        # Where autodiff may not differentiate the function, JAX has no forward mode of it.
        skipped -= {(entry.name, "second_order", "jvp of grad")}
    else:
        assert report.warnings == []
    if "formula" in expected or not forward_mode.REQUIRED:
        skipped = {each for each in skipped if each[1] != "forward_mode"}
    assert skipped <= CANNOT, report
    assert not [hint for hint in report.not_covered if "gradient" in hint.text]


# A projection of codes to codes is square, and that of a state to a state. Of the two projections
# of a recurrent cell one has the bias, of those of an LRU none.
SQUARE = "has axes of the same size, (4, 4)"
CANNOT_COVER = {
    ("SimVQ", "kernel", SQUARE),
    ("OptimizedLSTMCell", "cell.dense_i.bias", "is None"),
    *(("LRU", f"cell.{name}.bias", "is None") for name in "BC"),
    *(("LSTMCell", f"cell.{name}.bias", "is None") for name in ("ii", "if_", "ig", "io")),
    *(("LSTMCell", f"cell.{name}.kernel", SQUARE) for name in ("hi", "hf", "hg", "ho")),
    ("GRUCell", "cell.dense_h.bias", "is None"),
    *(
        (layer, f"{cell}.dense_h.{hint[0]}", hint[1])
        for layer, cell in (
            ("SimpleCell", "cell"),
            ("RNN", "rnn.cell"),
            ("Bidirectional", "layer.forward_rnn.cell"),
            ("Bidirectional", "layer.backward_rnn.cell"),
        )
        for hint in (("bias", "is None"), ("kernel", SQUARE))
    ),
}


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_the_examples_of_a_layer_cover_all_that_a_hint_can_tell(entry):
    """What every example of a layer leaves uncovered, nothing checks."""
    left = None
    for make in entry.examples.values():
        example = make(entry.module)
        hints = set(
            check_vjp(*example, **catalogue.expected(entry, example), checks=[]).not_covered
        )
        left = hints if left is None else left & hints
    assert {(entry.name, *hint) for hint in left} <= CANNOT_COVER


# A context that JAX knows of: with a new value nothing has been traced before.
_untraced = jax.make_user_context(default_value="")


@pytest.mark.parametrize("operation", THOROUGH, ids=lambda operation: operation.__name__)
def test_a_thorough_example_runs_its_operation(operation, monkeypatch):
    entry, name = THOROUGH[operation]
    example = entry.examples[name](entry.module)
    call = example[0]
    args = example
    if not isinstance(call, nnx.Module):
        args = example[1:]
    arrays, packed = pack_tree(args, "an argument")
    ran, backward = [], operation._bwd
    monkeypatch.setattr(operation, "_bwd", lambda *rule: ran.append(rule) or backward(*rule))

    def total(*arrays):
        layer_or_first, *rest = packed.unpack(arrays)
        out = layer_or_first(*rest) if args is example else call(layer_or_first, *rest)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x).astype(jnp.float32) for x in floats)

    floats = tuple(i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating))
    with _untraced(operation.__name__):
        jax.make_jaxpr(jax.grad(total, floats))(*arrays)
    assert ran
