"""The catalogue knows every public layer, and what it says of them is so."""

import re
from operator import attrgetter

import jax
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue

ENTRIES = catalogue.entries()


def test_every_public_layer_has_an_entry():
    families = {entry.family for entry in ENTRIES}
    public = {
        name
        for name, value in vars(fcg).items()
        if callable(value) and value.__module__.split(".")[1] in families
    }
    public |= {
        f"surrogate.{name}"
        for name, value in vars(fcg.surrogate).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == fcg.surrogate.__name__
    }
    assert {entry.name for entry in ENTRIES} == public - {
        "use_lowering",
        "Feedback",
        "Frozen",
        "DelayedScaling",
        "begin_step",
        "Quantizer",
        "QuantStat",
        "Int8Kernel",
        "Packed",
        "PackedKernel",
    }


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_complete(entry):
    assert attrgetter(entry.name)(fcg) is entry.module
    assert f".{entry.family}." in entry.module.__module__
    if entry.is_drop_in:
        assert entry.reference is getattr(nnx, entry.name, getattr(jax.nn, entry.name, None))
    assert entry.gradient in ("exact", "surrogate")
    assert (entry.formula is not None) == (entry.gradient == "surrogate")
    assert entry.keeps
    assert entry.gain
    assert not entry.source or re.match(r"https://|arXiv:\d{4}\.\d{4,5}", entry.source)
    assert entry.examples
    assert entry.workloads


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_examples_and_workloads_make_the_class_asked_for(entry):
    def layer_of(make):
        return next(part for part in make(entry.module) if isinstance(part, nnx.Module))

    if entry.is_function:
        assert all(make(entry.module)[0] for make in entry.examples.values())
        return

    for make in (*entry.examples.values(), *entry.workloads.values()):
        assert type(nnx.eval_shape(lambda make=make: layer_of(make))) is entry.module
    for make in entry.examples.values():
        *_, x = make(entry.module)
        assert x.shape[0] == 8


def test_names_are_unique_and_found():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert catalogue.find("Linear").module is fcg.Linear
    with pytest.raises(KeyError, match=r"no layer 'Lienar'; there are Linear, LinearGeneral"):
        catalogue.find("Lienar")


def test_drop_ins_lead_from_nnx_to_here():
    assert catalogue.drop_ins()[nnx.Linear] is fcg.Linear
    assert all(issubclass(ours, theirs) for theirs, ours in catalogue.drop_ins().items())
    assert all(isinstance(theirs, type) for theirs in catalogue.drop_ins())
