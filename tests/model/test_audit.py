"""`audit`: the bytes of each layer are those that the whole backward keeps, in every form."""

import io
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.nn import elu
from rich.console import Console

import flax_customgrad as fcg

FLOAT = 4
TOKENS = jnp.ones((2, 8), jnp.int32)
N = 2 * 8


class Block(nnx.Module):
    """A function that is called by name, one that is held, and arithmetic outside of layers."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 16, rngs=rngs)
        self.gate = nnx.Linear(4, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)
        self.act = nnx.silu

    def __call__(self, x):
        h = self.norm(x)
        return x + nnx.gelu(self.down(self.act(self.up(h)) * self.gate(h)))


class Model(nnx.Module):
    """Blocks one after the other, or stacked; a table that is used twice; a layer that is not."""

    def __init__(self, stacked=False, remat=False, n=3):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(32, 4, rngs=rngs)
        make = nnx.split_rngs(splits=n)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
        self.blocks = make(rngs) if stacked else nnx.List([Block(rngs) for _ in range(n)])
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens):
        def run(x, block):
            return block(x)

        run, x = nnx.remat(run) if self.remat else run, self.embed(tokens)
        if isinstance(self.blocks, Block):
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = run(x, block)
        return self.embed.attend(self.norm(x))


def whole(model, *inputs):
    graphdef, state = nnx.split(model, graph=True)
    return fcg.residual_bytes(lambda state, *x: nnx.merge(graphdef, state)(*x), state, *inputs)


def by_path(report, form="flax.nnx"):
    return {(row.path, row.name): row.kept.get(form) for row in report.rows}


@pytest.mark.smoke
@pytest.mark.parametrize("is_converted", [False, True], ids=["plain", "converted"])
def test_the_rows_add_up_to_what_the_whole_backward_keeps(is_converted):
    model = fcg.convert(Model()) if is_converted else Model()
    report = fcg.audit(model, TOKENS)
    assert report.kept["as it is"] == whole(model, TOKENS)
    with fcg.use_autodiff():
        assert report.kept["flax.nnx"] == whole(fcg.revert(nnx.clone(model)), TOKENS)
    with fcg.functions():
        assert report.kept["ours"] == whole(fcg.convert(nnx.clone(model)), TOKENS)
    layers = [row for row in report.rows if row.kind == "layer"]
    assert all(row.is_ours == is_converted for row in layers)
    (unused,) = (row for row in report.rows if row.path == "unused")
    assert "not called" in unused.remark
    assert not unused.kept


def test_an_array_belongs_to_the_layer_that_reads_it_in_call_order():
    model = nnx.Sequential(
        nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.silu, nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    )
    report = fcg.audit(model, jnp.ones((8, 4)))
    # The input of the model is held anyway; silu reads what the first layer makes.
    hidden = 8 * 16 * FLOAT
    ours = by_path(report, "ours")
    assert list(ours) == [
        (f"layers/{k}", f"nnx.{n}") for k, n in enumerate(["Linear", "silu", "Linear"])
    ]
    assert list(ours.values()) == [0, hidden, hidden]
    theirs = list(by_path(report).values())
    assert (theirs[0], theirs[2]) == (0, hidden)
    assert theirs[1] > hidden


def test_an_output_that_the_next_layer_reads_too_is_counted_there():
    model = nnx.Sequential(nnx.sigmoid, nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    report = fcg.audit(model, jnp.ones((8, 16)))
    assert list(by_path(report, "ours").values()) == [0, 8 * 16 * FLOAT]
    assert report.kept["ours"] == 8 * 16 * FLOAT


def test_calls_by_name_and_what_is_outside_of_layers():
    report = fcg.audit(Model(n=1), TOKENS)
    rows = {(row.path, row.name): row for row in report.rows}
    assert [path for path, _ in rows][:7] == [
        "embed",
        *(f"blocks/0/{name}" for name in ("norm", "up", "act", "gate", "down")),
        "blocks/0",
    ]
    gelu = rows["blocks/0", "nnx.gelu"]
    assert (gelu.kind, gelu.drop_in) == ("call", "fcg.gelu")
    assert gelu.kept["ours"] == N * 4 * FLOAT < gelu.kept["as it is"]
    # The product of the gate keeps both of its factors, and the layer after it the product.
    outside = rows["outside of layers", "in Block"]
    assert set(outside.kept.values()) == {2 * N * 16 * FLOAT}
    assert outside.remark.startswith("most of it at test_audit.py:")
    assert rows["blocks/0/down", "nnx.Linear"].kept["ours"] == N * 16 * FLOAT


def test_a_scan_counts_all_of_its_iterations():
    unrolled, stacked = fcg.audit(Model(), TOKENS), fcg.audit(Model(stacked=True), TOKENS)
    for form in ("flax.nnx", "ours"):
        each, all_at_once = by_path(unrolled, form), by_path(stacked, form)
        for name in ("norm", "up", "act", "down"):
            kind = next(kind for path, kind in each if path == f"blocks/0/{name}")
            blocks = sum(each[f"blocks/{k}/{name}", kind] for k in range(3))
            assert all_at_once[f"blocks/{name}", kind] == pytest.approx(blocks, abs=64)
    rows = {row.path: row for row in stacked.rows if row.kind == "layer"}
    assert "a stack of 3" in rows["blocks/up"].remark


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scan"])
def test_a_remat_has_a_row_and_its_layers_are_recomputed(stacked):
    model = Model(stacked, remat=True)
    report = fcg.audit(model, TOKENS)
    assert report.kept["as it is"] == whole(model, TOKENS)
    remats = [row for row in report.rows if row.kind == "remat"]
    assert [row.path for row in remats] == (
        ["blocks"] if stacked else [f"blocks/{k}" for k in range(3)]
    )
    assert sum(row.kept["ours"] for row in remats) == 3 * N * 4 * FLOAT
    inside = [row for row in report.rows if row.path.startswith("blocks") and row.kind != "remat"]
    assert all("recomputed" in row.remark and not any(row.kept.values()) for row in inside)
    assert report.rows.index(remats[0]) < report.rows.index(inside[0])


class Branches(nnx.Module):
    """A function in each branch of a cond."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        branches = lambda m, x: nnx.silu(m.linear(x)), lambda m, x: x
        return nnx.cond(x.sum() > 0, *branches, self, x)


def test_a_branch_of_a_cond_is_looked_into():
    rows = by_path(fcg.audit(Branches(), jnp.ones((8, 4))), "ours")
    assert rows["(the model)", "nnx.silu"] == 8 * 4 * FLOAT


def test_a_cell_is_counted_with_its_rnn():
    model = nnx.Sequential(nnx.RNN(nnx.GRUCell(4, 8, rngs=nnx.Rngs(0))))
    report = fcg.audit(model, jnp.ones((2, 5, 4)))
    rnn, *held = report.rows
    assert (rnn.path, rnn.kept["flax.nnx"] > rnn.kept["ours"] > 0) == ("layers/0", True)
    assert all(not row.kept and "counted with its nnx.RNN" in row.remark for row in held)
    assert report.kept["ours"] == rnn.kept["ours"]


def test_what_a_layer_of_flax_calls_belongs_to_it():
    # With dropout it calls jax.nn.softmax by name.
    model = nnx.MultiHeadAttention(2, 4, 4, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    report = fcg.audit(model, jnp.ones((2, 8, 4)), deterministic=False)
    assert [row.path for row in report.rows] == ["(the model)", "query", "key", "value", "out"]
    # The weights of both heads, which ours has not.
    assert report.rows[0].kept["flax.nnx"] - report.rows[0].kept["ours"] >= 2 * 2 * 8 * 8 * FLOAT


class Imported(nnx.Module):
    """It calls a function that was imported by name, and may fail."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.act = nnx.relu

    def __call__(self, x, fails=False):
        x = elu(self.act(self.linear(x)))
        if fails:
            raise RuntimeError("of the model")
        return x


def test_imports_are_told():
    report = fcg.audit(Imported(), jnp.ones((2, 4)))
    assert report.imports == (f"{__name__}.elu is imported by name; write nnx.elu or fcg.elu",)
    assert report.imports[0] in str(report)


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_the_model_is_left_as_it_was(fails):
    model = Imported()
    graphdef, methods = nnx.graphdef(model), (Imported.__call__, nnx.Linear.__call__, nnx.elu)
    if fails:
        with pytest.raises(RuntimeError, match="of the model"):
            fcg.audit(model, jnp.ones((2, 4)), fails=True)
    else:
        fcg.audit(model, jnp.ones((2, 4)))
    assert nnx.graphdef(model) == graphdef
    assert (Imported.__call__, nnx.Linear.__call__, nnx.elu) == methods
    assert model.act is nnx.relu


def test_what_it_is_called_with():
    model = Imported()
    report = fcg.audit(model, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert report == fcg.audit(model, x=jnp.ones((2, 4)))
    called = fcg.audit(model, jnp.ones((2, 4)), call=lambda model, x: (model(x) ** 2).sum())
    assert called.rows[-1].kind == "outside"
    with pytest.raises(TypeError, match="write audit"):
        fcg.audit(model)
    with pytest.raises(TypeError, match="expected a Module"):
        fcg.audit(3, 4)


def test_the_table_is_narrow_and_groups_equal_blocks():
    report = fcg.audit(Model(), TOKENS)
    text = str(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(report)
    for whole_text in ("fcg.functions()", "nnx.LayerNorm", "blocks/0-2/norm"):
        assert whole_text in narrow.file.getvalue()
    assert "blocks/0-2/up" in text
    assert "blocks/0-2         nnx.gelu" in text
    (total,) = (line for line in lines if line.startswith("total"))
    assert f"ours is {report.kept['ours'] / report.kept['flax.nnx']:.0%}" in total
    markdown = report.to_markdown().splitlines()
    assert markdown[0].count("|") == markdown[2].count("|") == 6
    assert "| blocks/0-2 | nnx.gelu |" in report.to_markdown()


def test_the_compiled_step_stands_beside_it():
    report = fcg.audit(Imported(), jnp.ones((64, 4)), compiled=True)
    assert set(report.temporary_bytes) == {"flax.nnx", "ours"}
    assert all(report.temporary_bytes.values())
    assert "of temporary memory" in str(report)


def test_the_picture(tmp_path, monkeypatch):
    report = fcg.audit(Model(n=6), TOKENS)
    svg = report.to_svg()
    assert svg == report.to_svg()
    for text in ("blocks/0-5/up", "nnx.gelu", "Model"):
        assert text in svg
    report.save(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a picture is a \.svg or a \.png file"):
        report.save(tmp_path / "kept.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .*\[plot\]"):
        report.to_svg()
