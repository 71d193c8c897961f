"""The estimators against torch and the code of ReinMax's authors; the values are frozen."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.estimators.categorical import gumbel_softmax, reinmax, top_k

VALUES = json.loads((Path(__file__).parents[2] / "oracles" / "categorical.json").read_text())[
    "values"
]
TEMPERATURES = ["0.3", "1.7"]


def applied(op, temperature, noise):
    """Value and gradient of an operation that is given its noise."""
    y, pull = jax.vjp(lambda logits: op(logits, temperature, noise), jnp.array(VALUES["logits"]))
    return y, pull(jnp.array(VALUES["cotangent"]))[0]


@pytest.mark.parametrize(
    ("kind", "temperature"), [("soft", "1.7"), *(("hard", t) for t in TEMPERATURES)]
)
def test_gumbel_softmax_is_that_of_torch(kind, temperature):
    ops = {
        "soft": lambda *args: gumbel_softmax.soft_sample(*args, -1),
        "hard": lambda *args: top_k.top_k(*args, 1, -1),
    }
    expected = VALUES[kind][temperature]
    with jax.enable_x64(True):
        y, dlogits = applied(ops[kind], float(temperature), jnp.array(VALUES["noise"]))
    # torch's zeros and ones are rounded.
    np.testing.assert_allclose(y, expected["y"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dlogits, expected["dlogits"], rtol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reinmax_is_that_of_its_authors(temperature):
    expected = VALUES["reinmax"][temperature]
    with jax.enable_x64(True):
        # Noise that makes the same sample.
        noise = 100 * jnp.array(expected["y"])
        y, dlogits = applied(
            lambda *args: reinmax.one_hot_sample(*args, -1), float(temperature), noise
        )
    np.testing.assert_array_equal(y, expected["y"])
    np.testing.assert_allclose(dlogits, expected["dlogits"], rtol=1e-12, atol=1e-15)
