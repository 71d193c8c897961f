"""The benchmark of decoder blocks in a scan: all forms have one gradient, checkpoints keep less."""

import jax
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from benchmarks.scanned_decoder import FORMS, Block, value_and_grad


@pytest.fixture(scope="module")
def of_forms():
    """Gradients and temporary bytes, by form."""
    found = {}
    for form, (is_ours, *around) in FORMS.items():
        block = Block(nnx.Rngs(0), 16, 2, 256)
        if is_ours:
            fcg.convert(block)
        function, arguments = value_and_grad(block, 8, *around, shape=(2, 64, 16))
        compiled = jax.jit(function).lower(*arguments).compile()
        found[form] = compiled(*arguments)[1], compiled.memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_nnx(of_forms, form):
    (expected, _), (grads, _) = of_forms["flax.nnx"], of_forms[form]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(np.max(np.abs(a))))


@pytest.mark.parametrize("start", ["flax.nnx", "converted"])
def test_the_more_is_computed_again_the_less_is_kept(of_forms, start):
    nbytes = [n for form, (_, n) in of_forms.items() if form.startswith(start)]
    assert nbytes == sorted(nbytes, reverse=True)
    assert len(set(nbytes)) == len(nbytes)
