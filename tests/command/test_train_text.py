"""`train --task text`: a decoder on real text, plain and converted."""

import contextlib
import io
import re

import jax
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.__main__ import main
from flax_customgrad.command.side_by_side import comparison
from flax_customgrad.command.side_by_side.training_run import TrainingRun
from flax_customgrad.command.text import decoder, excerpts, text_task


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two rounds of timing, on few excerpts, with a decoder of one narrow block."""
    load = excerpts.load

    def load_few(seed):
        train, test = load(seed)
        return jax.tree.map(lambda a: a[:64], train), jax.tree.map(lambda a: a[:8], test)

    monkeypatch.setattr(comparison, "_ROUNDS", 2)
    monkeypatch.setattr(text_task, "TASK", text_task.TASK._replace(load=load_few, batch=4))
    for name, size in {"_WIDTH": 8, "_HIDDEN": 16, "_HEADS": 2, "_BLOCKS": 1}.items():
        monkeypatch.setattr(decoder, name, size)


def test_the_whole_job(tmp_path, monkeypatch):
    results = []

    def compare(*args):
        results.append(compare_runs(*args))
        return results[0]

    compare_runs = comparison.compare
    monkeypatch.setattr(comparison, "compare", compare)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(
            ["train", "--task", "text", "--steps", "3", "--out", str(tmp_path / "figure.png")]
        )
    assert (status, err.getvalue()) == (0, "")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = out.getvalue()[out.getvalue().index("text, 3 steps, seed 0") :]
    assert max(map(len, table.splitlines())) <= 80
    for path in ("embed", "blocks/0/norm_1", "blocks/0/attn/query", "blocks/0/mlp/gate", "head"):
        (row,) = re.findall(rf"^ *{path} .*$", table, re.M)
        assert row.rstrip().endswith("converted")
    assert not re.search(r"^ *blocks/0/mlp ", table, re.M)  # It only holds layers.
    (result,) = results
    plain, converted = result.plain, result.converted
    np.testing.assert_allclose(converted.losses, plain.losses, rtol=1e-5)
    assert converted.residual_bytes < plain.residual_bytes


def test_what_is_called_by_name_is_ours_in_the_converted_run():
    batch, _ = text_task.TASK.load(0)
    kept = [
        TrainingRun(
            text_task.TASK, fcg.convert(decoder.Decoder(nnx.Rngs(0))), context
        ).residual_bytes(batch)
        for context in (fcg.functions(), lambda f: f)
    ]
    assert kept == sorted(set(kept))


def test_the_text_is_split_into_excerpts_and_the_bytes_that_follow():
    train, test = excerpts.load(1)
    assert train.tokens.shape[1:] == test.labels.shape[1:] == (excerpts.LENGTH,)
    assert len(train.tokens) > 8 * len(test.tokens) > 1000
    for text in (train, test):
        np.testing.assert_array_equal(text.tokens[:, 1:], text.labels[:, :-1])
    both = np.concatenate([train.tokens, test.tokens])
    again = np.concatenate([part.tokens for part in excerpts.load(2)])
    assert not np.array_equal(again, both)
    np.testing.assert_array_equal(*(np.sort(a.view("S256").ravel()) for a in (again, both)))
    assert b"def " in train.tokens.astype(np.uint8).tobytes()
