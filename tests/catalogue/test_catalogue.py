"""The catalogue knows every public layer, and what it says of them is so."""

import importlib
import pkgutil
import re
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue

ENTRIES = catalogue.entries()
PACKAGE = Path(fcg.__file__).parent
FAMILIES = {".".join(p.parent.relative_to(PACKAGE).parts): p for p in PACKAGE.rglob("entries.py")}

# What is public beside layers: what they hold, and what is done with them.
NO_LAYERS = {
    "Audit",
    "AuditRow",
    "BackwardState",
    "BackwardStateError",
    "BlockKernel",
    "Codebook",
    "Codes",
    "Conversion",
    "ConversionRow",
    "CotangentError",
    "CustomVJP",
    "DelayedScaling",
    "Feedback",
    "Fp8Kernel",
    "Frozen",
    "Int8Kernel",
    "NMKernel",
    "Packed",
    "PackedKernel",
    "QuantStat",
    "Quantized",
    "Quantizer",
    "Residual",
    "Rule",
    "Scheme",
    "Size",
    "SizeReport",
    "audit",
    "backward_state",
    "begin_step",
    "calibrate",
    "codebook_perplexity",
    "conversion",
    "convert",
    "custom_vjp",
    "fold_batch_norm",
    "functions",
    "load_backward_state",
    "nearest_code",
    "pack",
    "reset_backward_state",
    "residual_bytes",
    "residuals",
    "revert",
    "size_report",
    "unpack",
    "use_autodiff",
    "use_lowering",
}


@pytest.mark.smoke
def test_every_public_layer_has_an_entry():
    public = {name for name in fcg.__all__ if callable(getattr(fcg, name))}
    public |= {f"surrogate.{name}" for name in fcg.surrogate.__all__}
    missing = public - NO_LAYERS - {entry.name for entry in ENTRIES}
    assert not missing, f"add an entry to the family's entries.py for {sorted(missing)}"
    assert {entry.name for entry in ENTRIES} <= public


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_collected(family):
    entries = importlib.import_module(f"flax_customgrad.{family}.entries").ENTRIES
    assert set(map(id, entries)) <= set(map(id, ENTRIES)), (
        f"the entries of {family} are in no catalogue: add the module to _FAMILIES in "
        "flax_customgrad/catalogue/__init__.py"
    )
    assert {entry.family for entry in entries} == {family.rpartition(".")[2]}


def test_every_folder_with_layers_has_entries():
    folders = {".".join(e.module.__module__.split(".")[1:-1]) for e in ENTRIES}
    assert folders <= {""} | set(FAMILIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_complete(entry):
    assert attrgetter(entry.name)(fcg) is entry.module
    if entry.is_drop_in:
        assert entry.reference is getattr(nnx, entry.name, getattr(jax.nn, entry.name, None))
    assert entry.gradient in ("exact", "surrogate")
    assert (entry.formula is not None) == (entry.gradient == "surrogate")
    assert entry.keeps
    assert entry.gain
    assert not entry.source or re.match(r"https://|arXiv:\d{4}\.\d{4,5}", entry.source)
    assert entry.examples
    assert entry.workloads
    assert set(entry.operations.values()) <= set(entry.examples)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_examples_and_workloads_make_the_class_asked_for(entry):
    makers = [*entry.examples.values(), *entry.workloads.values()]

    def layers_and_last_inputs():
        for make in makers:
            *parts, x = make(entry.module)
            yield next((p for p in parts if isinstance(p, nnx.Module)), None), jnp.asarray(x)

    made = nnx.eval_shape(lambda: list(layers_and_last_inputs()))
    for layer, _ in made:
        assert layer is None if entry.is_function else type(layer) is entry.module
    for _, x in made[: len(entry.examples)]:
        assert entry.is_function or x.shape[0] == 8


def test_names_are_unique_and_found():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert catalogue.find("Linear").module is fcg.Linear
    with pytest.raises(KeyError, match=r"no layer 'Lienar': did you mean Linear or"):
        catalogue.find("Lienar")
    assert catalogue.find("layernorm").module is fcg.LayerNorm
    with pytest.raises(KeyError, match="did you mean geglu or GeGLU"):
        catalogue.find("GEGLU")


@pytest.mark.smoke
def test_drop_ins_lead_from_nnx_to_here():
    assert catalogue.drop_ins()[nnx.Linear] is fcg.Linear
    assert all(issubclass(ours, theirs) for theirs, ours in catalogue.drop_ins().items())
    assert all(isinstance(theirs, type) for theirs in catalogue.drop_ins())


def test_no_file_of_a_family_has_the_name_of_another():
    seen = {}
    for module in pkgutil.walk_packages(fcg.__path__, "flax_customgrad."):
        folder, _, name = module.name.rpartition(".")
        if not module.ispkg and name not in ("__main__", "entries"):
            seen.setdefault(name, []).append(folder)
    assert {name: folders for name, folders in seen.items() if len(folders) > 1} == {}
