"""LRU and MinGRU: against their formulas, step by step and all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.recurrent import linear_cell

MADE = {
    "LRU": lambda **kwargs: fcg.LRU(3, 4, r_min=0.4, r_max=0.99, rngs=nnx.Rngs(0), **kwargs),
    "MinGRU": lambda **kwargs: fcg.MinGRU(
        3, 4, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0), **kwargs
    ),
}
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3)))


def formula(cell, x):
    """The outputs for a state of zeros, in NumPy and float64, as the papers write them."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(cell)))
    x = np.asarray(x, np.float64)
    h = np.zeros((len(x), 4), np.complex128 if isinstance(cell, fcg.LRU) else np.float64)
    outputs = []
    for t in range(x.shape[1]):
        if isinstance(cell, fcg.LRU):
            factor = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
            B = p["B"]["kernel"][:, :4] + 1j * p["B"]["kernel"][:, 4:]
            C = p["C"]["kernel"][:4] - 1j * p["C"]["kernel"][4:]
            h = factor * h + np.exp(p["gamma_log"]) * (x[:, t] @ B)
            outputs.append((h @ C).real + p["D"] * x[:, t])
        else:
            k, n = (x[:, t] @ p[d]["kernel"] + p[d]["bias"] for d in ("dense_z", "dense_n"))
            z = 1 / (1 + np.exp(-k))
            h = (1 - z) * h + z * n
            outputs.append(h)
    return np.stack(outputs, 1)


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_formula_of_its_paper(name):
    cell = MADE[name]()
    np.testing.assert_allclose(fcg.RNN(cell)(X), formula(cell, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_all_at_once_is_step_by_step(name, monkeypatch):
    """Outputs, the last state, and gradients, from a state of the user's; reversed too."""
    cell, ran = MADE[name](), []
    operation = linear_cell.linear_recurrence
    monkeypatch.setattr(
        linear_cell, "linear_recurrence", lambda *a, **k: ran.append(1) or operation(*a, **k)
    )
    h = cell.initialize_carry((2, 3), nnx.Rngs(0), nnx.initializers.normal(1.0))
    lengths = jnp.asarray([4, 9])

    @jax.jit
    def both(h, x):
        found = []
        for rnn in (fcg.RNN, nnx.RNN):

            def loss(cell, h, x, rnn=rnn):
                layer = rnn(cell, rngs=False, return_carry=True)
                last, y = layer(x, initial_carry=h, seq_lengths=lengths, reverse=True)
                return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.real(last) ** 2), (last, y)

            (_, out), gradients = nnx.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
                nnx.clone(cell), h, x
            )
            found.append(jax.tree.leaves((out, gradients)))
        return found

    for a, b in zip(*both(h, X), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert ran


@pytest.mark.parametrize("name", MADE)
def test_half_precision_has_states_in_float32(name):
    """Factors near 1 would be 1 in bfloat16, and their sum would grow without an end."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 100, 3)), jnp.bfloat16)
    half, single = MADE[name](dtype=jnp.bfloat16), MADE[name]()
    y = fcg.RNN(half)(x)
    assert y.dtype == jnp.bfloat16
    h = half.initialize_carry((2, 3))
    assert h.dtype == (jnp.complex64 if name == "LRU" else jnp.float32)
    expected = formula(single, x)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=0, atol=0.03 * np.abs(expected).max()
    )
    assert nnx.RNN(half)(x).dtype == jnp.bfloat16


def test_an_lru_starts_on_its_ring():
    cell = fcg.LRU(3, 256, r_min=0.8, r_max=0.9, max_phase=1.0, rngs=nnx.Rngs(0))
    a, b = cell._terms(jnp.ones((4, 3)), jnp.complex64)
    assert 0.8 <= float(jnp.abs(a).min()) < 0.82 < 0.88 < float(jnp.abs(a).max()) <= 0.9
    assert 0 < float(jnp.angle(a).min()) < 0.1 < 0.9 < float(jnp.angle(a).max()) <= 1.0
    np.testing.assert_allclose(
        jnp.exp(cell.gamma_log[...]), jnp.sqrt(1 - jnp.abs(a) ** 2), rtol=1e-4
    )
    assert b.shape == (4, 256)


@pytest.mark.smoke
def test_errors():
    for bad in ({"r_min": 0.9, "r_max": 0.5}, {"r_max": 1.5}, {"r_min": -0.1}):
        with pytest.raises(ValueError, match="0 <= r_min < r_max <= 1 is needed"):
            fcg.LRU(3, 4, **bad, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_phase=7"):
        fcg.LRU(3, 4, max_phase=7.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="carry_init draws from rngs"):
        MADE["MinGRU"]().initialize_carry((2, 3), carry_init=nnx.initializers.ones)
