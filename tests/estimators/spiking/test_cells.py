"""Cells of spiking neurons: beside a loop in Python, under scan and RNN, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import flax_customgrad as fcg
from flax_customgrad import surrogate

RESETS = ("subtract", "zero", "none")
STEPS = 12
X = np.asarray(jax.random.uniform(jax.random.key(0), (STEPS, 2, 3)), np.float64)


def after(reset, v, s, theta):
    return {"subtract": v - theta * s, "zero": v * (1 - s), "none": v}[reset]


def leaky_in_numpy(x, reset, decay, theta):
    u, spikes = np.zeros(x.shape[1:]), []
    for x_t in x:
        v = decay * u + x_t
        s = (v > theta) * 1.0
        u = after(reset, v, s, theta)
        spikes.append(s)
    return np.stack(spikes), u


def lif_in_numpy(x, reset, tau_syn, tau_mem, theta):
    i, u, spikes = np.zeros(x.shape[1:]), np.zeros(x.shape[1:]), []
    for x_t in x:
        i = np.exp(-1 / tau_syn) * i + x_t
        v = np.exp(-1 / tau_mem) * u + i
        s = (v > theta) * 1.0
        u = after(reset, v, s, theta)
        spikes.append(s)
    return np.stack(spikes), (i, u)


def over_time(cell, x):
    carry, spikes = lax.scan(cell, cell.initialize_carry(x.shape[1:]), x)
    return spikes, carry


def learned(cls, **neurons):
    return cls(3, learn_decay=True, learn_threshold=True, spike=surrogate.atan, **neurons)


def test_beside_a_loop():
    each = np.array([0.7, 1.0, 1.4])

    @jax.jit
    def program(x):
        return [
            over_time(cell, x)
            for reset in RESETS
            for cell in (
                fcg.Leaky(3, decay=0.8, threshold=each, reset=reset, param_dtype=jnp.float64),
                fcg.LIF(3, tau_syn=2.0, tau_mem=3 * each, reset=reset, param_dtype=jnp.float64),
            )
        ]

    with jax.enable_x64(True):
        found = program(jnp.asarray(X))
    expected = [
        result
        for reset in RESETS
        for result in (
            leaky_in_numpy(X, reset, 0.8, each),
            lif_in_numpy(X, reset, 2.0, 3 * each, 1.0),
        )
    ]
    for (spikes, carry), (expected_spikes, expected_carry) in zip(found, expected, strict=True):
        assert 0 < expected_spikes.mean() < 1
        np.testing.assert_array_equal(spikes, expected_spikes)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
            carry,
            expected_carry,
        )


@pytest.mark.smoke
def test_a_spike_needs_more_than_the_threshold():
    cell = fcg.Leaky(2, decay=0.0)
    _, spikes = cell(jnp.zeros(2), jnp.array([1.0, 1.0 + 1e-6]))
    np.testing.assert_array_equal(spikes, [0, 1])


def test_gradient_over_time_is_that_of_autodiff():
    """Of the same steps in plain JAX, whose spike is the surrogate."""
    cells = [
        learned(fcg.Leaky, decay=0.8, reset=reset, reset_gradient=reset_gradient)
        for reset in RESETS
        for reset_gradient in (False, True)
    ]

    def loss(spikes, u):
        return (spikes * jnp.arange(1.0, STEPS + 1)[:, None, None]).sum() + (u**2).sum()

    def ours(cell, x):
        return loss(*over_time(cell, x))

    def plain(cell, x):
        decay, theta = cell.decay[...], cell.threshold[...]

        def step(u, x):
            v = decay * u + x
            s = surrogate.atan(v - theta)
            r = s if cell.reset_gradient else lax.stop_gradient(s)
            return after(cell.reset, v, r, theta), s

        u, spikes = lax.scan(step, jnp.zeros(x.shape[1:]), x)
        return loss(spikes, u)

    @nnx.jit
    def gradients(cells, x):
        return [[nnx.grad(f, argnums=(0, 1))(cell, x) for f in (ours, plain)] for cell in cells]

    for got, expected in gradients(cells, jnp.asarray(X, jnp.float32)):
        assert len(jax.tree.leaves(got)) == 3
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), got, expected)


@pytest.mark.parametrize("cls", [fcg.Leaky, fcg.LIF])
def test_under_rnn_as_under_scan(cls):
    cell, x = learned(cls), jnp.asarray(X, jnp.float32)
    rnn = nnx.RNN(cell, time_major=True, return_carry=True)
    batch_major = nnx.RNN(cell)

    @nnx.jit
    def program(rnn, batch_major, x):
        def loss(rnn, x):
            return (rnn(x)[1] * x).sum()

        expected = over_time(rnn.cell, x)
        return expected, rnn(x), batch_major(x.swapaxes(0, 1)), nnx.grad(loss)(rnn, x)

    (expected, carry), (found_carry, found), batch_first, grads = program(rnn, batch_major, x)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, found_carry, carry)
    np.testing.assert_array_equal(batch_first.swapaxes(0, 1), expected)
    assert len(jax.tree.leaves(grads)) == (2 if cls is fcg.Leaky else 3)
    assert all(np.isfinite(g) and g != 0 for g in jax.tree.leaves(grads))


def test_neurons_in_the_shape_of_an_image():
    cell = fcg.Leaky((4, 4, 2), decay=jnp.full((2,), 0.5))
    x = jnp.ones((3, 5, 4, 4, 2))  # a batch of 3, 5 steps
    assert nnx.RNN(cell)(x).shape == x.shape
    assert cell.num_feature_axes == 3


@pytest.mark.parametrize("graph", [True, False])
def test_under_the_vmap_of_nnx(graph):
    @functools.partial(nnx.vmap, in_axes=(None, 0), graph=graph, graph_updates=False)
    def run(cell, x):
        return over_time(cell, x)[0]

    cell, x = fcg.LIF(3), jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(run(cell, jnp.stack([x, x / 2]))[1], over_time(cell, x / 2)[0])


def test_what_is_kept():
    x = jnp.ones((STEPS, 8, 3))
    a_state = STEPS * 24 * 4
    few = 4 * 4  # decays and threshold

    def kept(cell):
        graph, params, fixed = nnx.split(cell, nnx.Param, ...)
        run = lambda params, x: over_time(nnx.merge(graph, params, fixed), x)[0]  # noqa: E731
        return fcg.residual_bytes(run, params, x)

    for reset in RESETS:
        for reset_gradient in (False, True):
            neurons = {"reset": reset, "reset_gradient": reset_gradient}
            assert kept(fcg.Leaky(3, **neurons)) <= a_state + few
            assert kept(fcg.LIF(3, **neurons)) <= a_state + few
            assert kept(learned(fcg.Leaky, **neurons)) <= 2 * a_state + few
            assert kept(learned(fcg.LIF, **neurons)) <= 3 * a_state + few


def test_dtypes():
    cell = fcg.Leaky(3)
    u, spikes = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3), jnp.bfloat16))
    assert (u.dtype, spikes.dtype) == (jnp.float32, jnp.bfloat16)
    u, spikes = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3), bool))
    assert (u.dtype, spikes.dtype) == (jnp.float32, jnp.float32)
    low = fcg.LIF(3, param_dtype=jnp.bfloat16)
    (i, u), _ = low(low.initialize_carry((2, 3)), jnp.ones((2, 3)))
    assert i.dtype == u.dtype == low.current_decay.dtype == jnp.bfloat16
    # Narrow states and wide inputs, and the other way around.
    for cell, dtype in ((low, jnp.float32), (fcg.LIF(3), jnp.float16)):
        x = jnp.ones((STEPS, 2, 3), dtype)
        total = lambda x, cell=cell: over_time(cell, x)[0].astype(jnp.float32).sum()  # noqa: E731
        g = jax.jit(jax.grad(total))(x)
        assert g.dtype == dtype
        assert np.isfinite(np.asarray(g, np.float32)).all()


@pytest.mark.parametrize("reset", RESETS)
def test_huge_inputs_and_no_numbers(reset):
    cell = learned(fcg.Leaky, reset=reset)

    @jax.jit
    def step(u, x):
        (u, spikes), pull = jax.vjp(cell, u, x)
        return spikes, pull((u * 0, spikes))

    for dtype, huge in (("float32", 1e30), ("bfloat16", 1e30), ("float16", 6e4)):
        x = jnp.array([[-huge, 1e3, huge]], dtype)
        spikes, cotangents = step(jnp.zeros_like(x), x)
        np.testing.assert_array_equal(spikes, [[0, 1, 1]])
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in cotangents)
    u, spikes = cell(jnp.zeros(3), jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    assert np.isnan(u[0])
    assert np.isnan(spikes[0])
    np.testing.assert_array_equal(spikes[1:], [1, 0])
    assert u[1] == (0 if reset == "zero" else np.inf)


def test_a_learned_decay_beyond_its_bounds_counts_as_the_bound_and_comes_back():
    cell = fcg.Leaky(1, decay=1.0, learn_decay=True, reset="none")
    cell.decay[...] = jnp.array(1.5)

    def final(cell):
        return cell(jnp.array([2.0]), jnp.array([0.1]))[0].sum()

    value, grads = nnx.value_and_grad(final)(cell)
    np.testing.assert_allclose(value, 2.1, rtol=1e-6)
    assert grads["decay"][...] == 2


def test_a_fixed_decay_is_no_parameter():
    assert not jax.tree.leaves(nnx.state(fcg.LIF(3), nnx.Param))
    names = set(nnx.to_pure_dict(nnx.state(learned(fcg.LIF), nnx.Param)))
    assert names == {"current_decay", "membrane_decay", "threshold"}


def test_a_slope_may_be_annealed_in_a_jitted_step():
    x = jnp.asarray(X, jnp.float32)

    @jax.jit
    def gradient(slope, x):
        cell = fcg.Leaky(3, spike=functools.partial(surrogate.atan, slope=slope))
        return jax.grad(lambda x: over_time(cell, x)[0].sum())(x)

    fixed = fcg.Leaky(3, spike=functools.partial(surrogate.atan, slope=5.0))
    expected = jax.jit(jax.grad(lambda x: over_time(fixed, x)[0].sum()))(x)
    np.testing.assert_allclose(gradient(5.0, x), expected, rtol=1e-5, atol=1e-7)
    assert np.abs(gradient(2.0, x) - expected).max() > 0.1


def test_a_spike_of_ones_own():
    @jax.custom_jvp
    def spike(u):
        return (u > 0).astype(u.dtype)

    spike.defjvp(lambda primals, tangents: (spike(*primals), 3 * tangents[0]))
    cell = fcg.Leaky(2, spike=spike)
    g = jax.grad(lambda x: cell(jnp.zeros(2), x)[1].sum())(jnp.array([0.5, 7.0]))
    np.testing.assert_array_equal(g, 3)


def test_a_state_to_start_with():
    cell = fcg.LIF(3)
    i, u = cell.initialize_carry((2, 3))
    assert i.shape == u.shape == (2, 3)
    assert not i.any()
    i, u = cell.initialize_carry((2, 3), nnx.Rngs(0), nnx.initializers.normal())
    assert (i != u).all()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fcg.Leaky(0), r"Leaky: features=0 must be at least 1"),
        (lambda: fcg.LIF((4, 0)), r"LIF: features=\(4, 0\) must be at least 1"),
        (lambda: fcg.LIF(()), r"LIF: features=\(\) must be at least 1"),
        (lambda: fcg.Leaky(3, decay=1.1), r"Leaky: decay=1.1 must be from 0 to 1"),
        (lambda: fcg.Leaky(3, decay=float("nan")), r"Leaky: decay=nan must be from 0 to 1"),
        (lambda: fcg.Leaky(3, decay=np.ones(2)), r"decay of shape \(2,\) does not broadcast to th"),
        (lambda: fcg.Leaky(3, decay=np.ones((2, 3))), r"decay of shape \(2, 3\) does not broad"),
        (lambda: fcg.Leaky(3, threshold=0.0), r"Leaky: threshold=0.0 must be positive and finite"),
        (lambda: fcg.LIF(3, tau_syn=0.0), r"LIF: tau_syn=0.0 must be positive and finite"),
        (lambda: fcg.LIF(3, tau_mem=-2), r"LIF: tau_mem=-2 must be positive and finite"),
        (lambda: fcg.LIF(3, reset="off"), r"LIF: reset='off' is none of 'subtract', 'zero', 'none"),
        (
            lambda: fcg.Leaky(3).initialize_carry((2, 4)),
            r"Leaky: inputs of shape \(2, 4\) do not end in the neurons, \(3,\)",
        ),
        (
            lambda: fcg.Leaky(3)(jnp.zeros((2, 3)), jnp.zeros((2, 4))),
            r"Leaky: inputs of shape \(2, 4\) do not end in the neurons, \(3,\)",
        ),
        (
            lambda: fcg.Leaky(3)(jnp.zeros(3), jnp.zeros((2, 3))),
            r"the carry has shape \(3,\), the inputs have \(2, 3\): make it with initialize_carry",
        ),
        (
            lambda: fcg.Leaky(3).initialize_carry((3,), None, nnx.initializers.normal()),
            r"Leaky: carry_init draws from rngs; pass rngs=nnx.Rngs\(0\) too",
        ),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match=r"Leaky: spike='atan' is no function; write surrogate.at"):
        fcg.Leaky(3, spike="atan")
    with pytest.raises(TypeError, match=r"Leaky takes float16, bfloat16, .*, got complex64"):
        fcg.Leaky(3)(jnp.zeros(3), jnp.zeros(3, jnp.complex64))
    with pytest.raises(TypeError, match="beta"):
        fcg.Leaky(3, beta=0.9)
    with pytest.raises(TypeError):
        fcg.Leaky(3.0)
