"""The pages of docs/uses: what they say is so, of the code that they show."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("run_page", DOCS / "run_page.py")
run_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_page)


def page(name):
    """What a page has defined, once its cells have run."""
    return SimpleNamespace(**run_page.run(DOCS / "uses" / f"{name}.md"))


def test_an_equilibrium_layer_has_the_gradient_of_its_iteration_and_keeps_one_step():
    of = page("a_layer_of_your_own")
    assert len(of.report.rows) > 1
    assert not of.report.failures
    # Eight examples of 16 numbers, once and not for each iteration.
    assert of.kept["equilibrium"] == 8 * 16 * 4
    assert of.kept["unrolled"] > 60 * of.kept["equilibrium"]


def test_training_rules_align_and_step_as_sgd_does():
    of = page("training_rules")
    assert of.losses[-1] < of.losses[0] / 10
    assert of.cosines[1] > of.cosines[0] + 0.1
    assert of.difference < 1e-7
    moved = jnp.abs(of.model.kernels[...] - of.kernels).max()
    assert moved > 1e-4
    if jax.__version_info__ >= (0, 12):
        plain, ours = list(of.memory.values())[1:]
        assert plain > of.kernels.nbytes > 3 * ours


def test_meta_learning_has_the_gradient_of_nnx_and_learns_from_one_step():
    of = page("meta_learning")
    assert of.difference(of.ours, of.theirs) < 1e-5
    assert of.difference(of.first_order, of.theirs) > 1e-2
    before, after = of.errors
    assert after < before / 2


def test_state_that_the_backward_updates():
    of = page("backward_state")
    counts = [layer.statistics[0] for layer in of.model.layers if isinstance(layer, of.Watched)]
    assert counts == [20] * 10
    assert of.rms[0] < of.rms[-1] / 10
    np.testing.assert_allclose(of.norms, [2, 2, 4, 2], rtol=1e-6)
