"""`conversion`: each layer and function is listed with its fate, before and after `convert`."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.nn import elu, softplus

import flax_customgrad as fcg

R = nnx.Rngs(0)
X = jnp.ones((2, 4))


class Doubled(nnx.Linear):
    """A subclass with a method of its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Narrow(nnx.Linear):
    """A subclass with another constructor."""

    def __init__(self, features, *, rngs):
        super().__init__(features, features, rngs=rngs)


class Mine(fcg.Linear):
    """A subclass of a drop-in."""


class Gain(nnx.Module):
    """A layer of a user's own."""

    def __init__(self):
        self.gain = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return self.gain * x


class Model(nnx.Module):
    """One layer for each fate, functions that are held, called and imported."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Linear(4, 4, rngs=rngs),
                nnx.Linear(4, 4, dot_general=lambda *a, **k: lax.dot_general(*a, **k), rngs=rngs),
                Doubled(4, 4, rngs=rngs),
                Narrow(4, rngs=rngs),
                Mine(4, 4, rngs=rngs),
                Gain(),
                nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs),
                fcg.QuantLinear(4, 4, weight=fcg.FakeQuant(8), rngs=rngs),
            ]
        )
        self.shared = self.layers[0]
        self.act = nnx.gelu
        self.own = self.twice

    def twice(self, x):
        return 2 * x

    def __call__(self, x, scale=True):
        for layer in self.layers:
            if not isinstance(layer, nnx.MultiHeadAttention):
                x = self.act(layer(x))
        x = elu(nnx.relu(jax.nn.relu(x)))
        return jax.jit(lambda x: nnx.softmax(x))(x) if scale else x


def by_path(report):
    return {row.paths[0]: row for row in report.rows}


def fates(report):
    return {row.paths[0]: (row.name, row.drop_in, row.is_converted) for row in report.rows}


def test_every_layer_and_held_function_has_a_row_before_and_after():
    model = Model(R)
    graphdef = nnx.graphdef(model)
    before = fcg.conversion(model)
    assert nnx.graphdef(model) == graphdef
    rows = by_path(before)
    expected = {
        "layers/0": ("nnx.Linear", "fcg.Linear", False),
        "layers/1": ("nnx.Linear", "fcg.Linear", False),
        "layers/2": ("Doubled", "", False),
        "layers/3": ("Narrow", "", False),
        "layers/4": ("Mine", "fcg.Linear", True),
        "layers/5": ("Gain", "", False),
        "layers/7": ("fcg.QuantLinear", "fcg.QuantLinear", True),
        "layers/6/query": ("nnx.LinearGeneral", "fcg.LinearGeneral", False),
        "act": ("nnx.gelu", "fcg.gelu", False),
    }
    assert {path: fates(before)[path] for path in expected} == expected
    assert rows["layers/0"].paths == ("layers/0", "shared")
    assert rows["layers/1"].remark == "computes as flax.nnx, for it was given its own dot_general"
    assert rows["layers/2"].remark == "a subclass of nnx.Linear, with __call__ of its own"
    assert rows["layers/3"].remark == "a subclass of nnx.Linear; write subclasses=True"
    assert rows["layers/5"].remark == "no layer of flax.nnx"
    # A method is no function that is held, and what a layer of this library holds is its own.
    assert [row.paths[0] for row in before.rows if row.kind == "function"] == ["act"]
    assert list(rows).index("layers/6") < list(rows).index("layers/6/key")

    after = fcg.conversion(fcg.convert(model))
    converted = {path for path, row in by_path(after).items() if row.is_converted}
    possible = {path for path, row in rows.items() if row.drop_in}
    assert converted == possible
    assert {p: r.drop_in for p, r in rows.items()} == {
        p: r.drop_in for p, r in by_path(after).items()
    }
    assert "layers/1   " in str(after)
    assert "is fcg.Linear; computes as flax.nnx" in str(after)


def test_the_table_is_aligned_and_fits():
    text = str(fcg.conversion(Model(R), X))
    assert max(map(len, text.splitlines())) <= 100
    heading, *lines = text.splitlines()
    table = lines[
        : [line.startswith("Nothing") or line.startswith("Layers") for line in lines].index(True)
    ]
    column = heading.index("result")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)
    assert "would become fcg.Linear" in text
    assert text.splitlines() == [line.rstrip() for line in text.splitlines()]


def test_functions_that_are_called_by_name_and_imported():
    report = fcg.conversion(Model(R), X)
    calls = {(row.paths[0], row.name): row for row in report.rows if row.kind == "call"}
    assert set(calls) == {("Model.__call__", "nnx.relu"), ("<lambda>", "nnx.softmax")}
    assert calls["Model.__call__", "nnx.relu"].remark == "2 times"
    assert calls["<lambda>", "nnx.softmax"].drop_in == "fcg.softmax"
    # elu is used; softplus is imported by this module alone.
    (imported,) = (row for row in report.rows if row.kind == "import")
    assert imported.paths == (f"{__name__}.elu",)
    assert imported.remark == "imported by name; write nnx.elu or fcg.elu"
    assert softplus is nnx.softplus
    # What JAX has traced before is traced again.
    assert fcg.conversion(Model(R), X).rows == report.rows


def test_inputs_may_be_static_or_shapes_and_the_call_another():
    model = Model(R)
    report = fcg.conversion(model, X, False)
    assert "nnx.softmax" not in {row.name for row in report.rows}
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert fcg.conversion(model, shape, False) == report
    called = fcg.conversion(model, X, call=lambda model, x: model(x, scale=False))
    assert called == report
    with pytest.raises(TypeError, match="dot_general requires"):
        fcg.conversion(model, jnp.ones((2, 5)))


def test_what_the_backward_keeps():
    model = nnx.Sequential(nnx.Linear(4, 64, rngs=R), nnx.gelu, lambda x: nnx.softmax(x))
    before = fcg.conversion(model, X).kept_bytes
    assert list(before) == [
        "as it is",
        "flax.nnx",
        "converted",
        "converted, inside fcg.functions()",
    ]
    assert before["as it is"] == before["flax.nnx"] > 2 * before["converted"]
    assert before["converted"] > before["converted, inside fcg.functions()"]
    graphdef, params = nnx.split(fcg.convert(model))
    kept = fcg.residual_bytes(lambda params, x: nnx.merge(graphdef, params)(x), params, X)
    assert kept == before["converted"]
    fcg.revert(model, where="layers/1")
    after = fcg.conversion(model, X).kept_bytes
    assert before["converted"] < after["as it is"] <= before["flax.nnx"]
    assert {**after, "as it is": 0} == {**before, "as it is": 0}


class Noisy(nnx.Module):
    """It has streams, counts and statistics, which are not differentiated."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens):
        return self.dropout(nnx.relu(self.norm(self.embed(tokens)))), "a label"


def test_tokens_streams_and_statistics():
    model = Noisy(nnx.Rngs(0))
    report = fcg.conversion(model, jnp.arange(5))
    assert report.kept_bytes["converted"] < report.kept_bytes["flax.nnx"]
    assert model.norm.mean[...].sum() == 0


def test_a_stack_is_marked():
    @nnx.vmap
    def make(key):
        rngs = nnx.Rngs(key)
        return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.relu)

    report = fcg.conversion(make(jax.random.split(jax.random.key(0), 3)))
    assert [row.remark for row in report.rows] == ["a stack of 3", "a stack of 3", ""]


def test_products_that_a_tool_replaces(monkeypatch):
    model = nnx.Sequential(fcg.Linear(2, 2, rngs=R), fcg.LayerNorm(2, rngs=R))
    assert [row.remark for row in fcg.conversion(model).rows] == ["", ""]
    monkeypatch.setattr(lax, "dot_general", lambda *args, **kwargs: None)
    linear, norm = fcg.conversion(model).rows
    assert "something replaces the products of JAX" in linear.remark
    assert norm.remark == ""


def test_the_totals_say_what_is_left():
    def totals(model, *inputs):
        return str(fcg.conversion(model, *inputs)).splitlines()[-1]

    some = nnx.Sequential(nnx.Linear(2, 2, rngs=R), nnx.gelu)
    assert totals(some) == "Nothing is converted. Layers: 1 to convert. Functions: 1 to convert."
    assert totals(fcg.convert(some)) == "Layers: 1 converted. Functions: 1 converted."
    none = nnx.List([Gain()])
    expected = "Nothing is converted, and nothing would be. Layers: 1 stays. Functions: none."
    assert totals(none) == expected
    with pytest.raises(TypeError, match="expected a Module"):
        fcg.conversion(3)
