"""`benchmarks.drop_ins`: forwards, and layers in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import drop_ins
from flax_customgrad import catalogue
from flax_customgrad.command.benchmark.steps import in_dtype
from flax_customgrad.registry.examples import made, normal

EXAMPLE = made(4, 3, inputs=(lambda: normal(8, 4),))


def test_a_row_for_each_program(capsys, monkeypatch):
    paired = drop_ins.paired
    monkeypatch.setattr(drop_ins, "paired", lambda calls, *_: paired(calls, 0.0, rounds=2))
    entry = dataclasses.replace(catalogue.find("Linear"), workloads={"8x4": EXAMPLE})
    rows = drop_ins.measure(entry, 0.0)
    assert [row.program for row in rows] == list(drop_ins.PROGRAMS)
    assert {(row.layer, row.workload) for row in rows} == {("Linear", "8x4")}
    assert str(rows[0]) in capsys.readouterr().out


def test_what_is_measured_in_bfloat16_is_in_bfloat16():
    layer, x = in_dtype(EXAMPLE(catalogue.find("Linear").module), jnp.bfloat16)
    assert layer.kernel.dtype == x.dtype == layer(x).dtype == jnp.bfloat16
    compiled, arguments = drop_ins.PROGRAMS["step, bf16"](EXAMPLE(catalogue.find("Linear").module))
    assert {a.dtype for a in jax.tree.leaves(compiled(*arguments))} == {jnp.dtype("bfloat16")}
