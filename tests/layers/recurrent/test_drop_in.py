"""The cells and RNN take the place of nnx's: state, results, arguments, and what is left to nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.recurrent import recurrent_cell

NAMES = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def cells(name, **kwargs):
    """Ours and that of nnx, with the same parameters."""
    kwargs = {"bias_init": nnx.initializers.normal(1.0), **kwargs}
    return [getattr(m, name)(3, 4, **kwargs, rngs=nnx.Rngs(0)) for m in (fcg, nnx)]


def carry_of(name, *batch, dtype=jnp.float32):
    h = array(*batch, 4, dtype=dtype)
    return (2 * array(*batch, 4, dtype=dtype), h) if "LSTM" in name else h


def weighed(out):
    """A number that every element of an output changes differently."""
    leaves = [a.astype(jnp.float32) for a in jax.tree.leaves(out)]
    return sum(jnp.sum(jnp.sin(a) * jnp.cos(jnp.arange(a.size).reshape(a.shape))) for a in leaves)


def outcome(call, layer, *arrays):
    """The output, and the gradients of parameters and arrays; one compiled program."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, rest, arrays):
        def loss(params, arrays):
            out = call(nnx.merge(graphdef, params, rest, copy=True), *arrays)
            return weighed(out), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(params, arrays)

    gradients, out = run(params, rest, arrays)
    floats = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
    return out, floats


def assert_same(got, expected, tolerance=2e-6, exact=True):
    """Outputs to the bit where they are computed in the same order, gradients but for rounding."""
    (out, gradients), (expected_out, slopes) = got, expected
    assert jax.tree.structure(out) == jax.tree.structure(expected_out)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected_out), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else tolerance)
    for a, b in zip(gradients, slopes, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=1))


@pytest.fixture
def ran(monkeypatch):
    """Counts how often the operation ran, and not nnx."""
    calls = []
    operation = recurrent_cell.recurrence
    monkeypatch.setattr(
        recurrent_cell, "recurrence", lambda *args: calls.append(1) or operation(*args)
    )
    return calls


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_state_and_metadata_are_those_of_nnx(name):
    ours, theirs = cells(name, keep_rngs=False, kernel_metadata={"tag": "k"})
    a, b = nnx.state(ours), nnx.state(theirs)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert vars(ours).keys() == vars(theirs).keys()
    assert isinstance(ours, getattr(nnx, name))
    assert ours.num_feature_axes == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_step(name, ran):
    carry, x = carry_of(name, 2, 1), array(2, 1, 3)
    ours, theirs = (outcome(lambda m, c, x: m(c, x), m, carry, x) for m in cells(name))
    assert ran
    # The products of an LSTMCell are one here, summed in another order.
    assert_same(ours, theirs, exact=name != "LSTMCell")


def over_time(rnn, cell, **settings):
    """Calls an RNN, made with some settings, on a carry and inputs."""

    def call(cell, carry, x):
        layer = rnn(cell, rngs=False, unroll=settings.get("unroll", 1))
        given = {key: value for key, value in settings.items() if key != "unroll"}
        return layer(x, initial_carry=carry, **given)

    return call


LENGTHS = jnp.asarray([3, 0, 1, 5, 2])
SETTINGS = {
    "unroll": {"unroll": 3},
    "reverse": {"return_carry": True, "reverse": True},
    "lengths": {"return_carry": True, "seq_lengths": LENGTHS, "reverse": True},
    "lengths, keep_order, time_major": {
        "return_carry": True,
        "seq_lengths": LENGTHS,
        "reverse": True,
        "keep_order": True,
        "time_major": True,
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_of_a_call(settings, ran):
    settings = SETTINGS[settings]
    carry, x = carry_of("SimpleCell", 5), array(5, 5, 3)
    ours, theirs = (
        outcome(over_time(m.RNN, cell, **settings), cell, carry, x)
        for m, cell in zip((fcg, nnx), cells("SimpleCell"), strict=True)
    )
    assert len(ran) == 1
    assert_same(ours, theirs, exact=False)


@pytest.mark.parametrize(
    ("shape", "time_major"), [((7, 3), False), ((4, 2, 3, 3), True), ((0, 4, 3), False)], ids=str
)
def test_batches(shape, time_major, ran):
    batch = shape[1:-1] if time_major else shape[:-2]
    carry, x = carry_of("SimpleCell", *batch), array(*shape)
    settings = {"return_carry": True, "time_major": time_major, "reverse": True}
    ours, theirs = (
        outcome(over_time(m.RNN, cell, **settings), cell, carry, x)
        for m, cell in zip((fcg, nnx), cells("SimpleCell"), strict=True)
    )
    assert len(ran) == 1
    assert_same(ours, theirs, exact=False)


def test_lengths_of_several_batch_axes():
    """Each sequence has the carry that it has alone; nnx selects another, or fails."""
    rnn = fcg.RNN(fcg.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
    x, lengths = array(2, 3, 5, 3), jnp.asarray([[1, 5, 2], [3, 4, 0]])
    (_, h), y = rnn(x, seq_lengths=lengths)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(h[i, j], y[i, j, int(lengths[i, j]) - 1])


def test_no_steps():
    for m in (fcg, nnx):
        cell = m.SimpleCell(3, 4, rngs=nnx.Rngs(0))
        h, y = m.RNN(cell, return_carry=True)(jnp.ones((2, 0, 3)))
        assert h.shape == (2, 4)
        assert y.shape == (2, 0, 4)


def test_the_carry_that_a_cell_initializes_is_that_of_nnx():
    """With a stream of the layer, again, and with one that is given; the streams advance alike."""
    with pytest.warns(UserWarning, match="carry_init"):
        pair = cells("SimpleCell", carry_init=nnx.initializers.normal(1.0))
    layers = [
        m.RNN(cell, rngs=nnx.Rngs(5), return_carry=True)
        for m, cell in zip((fcg, nnx), pair, strict=True)
    ]
    x = array(2, 3, 3)
    for given in ({}, {}, {"rngs": nnx.Rngs(3)}, {"rngs": nnx.Rngs(carry=4).carry}):
        found = [layer(x, **nnx.clone(given)) for layer in layers]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *found)
    assert layers[0].rngs.count[...] == layers[1].rngs.count[...] == 2


# What is left to nnx.


def doubled(cell):
    """Another layer for a projection."""
    base = cell.dense_h
    cell.dense_h = nnx.LoRALinear(4, 12, lora_rank=2, use_bias=False, rngs=nnx.Rngs(9))
    cell.dense_h.kernel = base.kernel


def halved(arrays, *, dtype=None, inexact=True):
    return tuple(None if a is None else a / 2 for a in arrays)


LEFT = {
    "an activation": ({"activation_fn": jnp.sin}, None, {}),
    "a promotion": ({"promote_dtype": halved}, None, {}),
    "a projection": ({}, doubled, {}),
    "state_axes": (
        {},
        None,
        {"state_axes": nnx.StateAxes({nnx.Param: None, ...: nnx.Carry})},
    ),
    "broadcast_rngs": ({}, None, {"broadcast_rngs": "carry"}),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_nnx(case, ran):
    made, edit, settings = LEFT[case]
    h, x = carry_of("GRUCell", 2), array(2, 3, 3)
    outputs = []
    for m, cell in zip((fcg, nnx), cells("GRUCell", **made), strict=True):
        if edit is not None:
            edit(cell)
        outputs.append(m.RNN(cell, rngs=False, **settings)(x, initial_carry=h))
    # nnx traces one step, which is an operation of its own where only RNN is left to nnx.
    assert len(ran) == bool(settings)
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-6)


def test_the_activations_that_have_rules(ran):
    carry, x = carry_of("SimpleCell", 5), array(5, 3)

    def call(cells, carry, x):
        return [cell(carry, x) for cell in cells]

    results = []
    for m in (fcg, nnx):
        made = [
            m.SimpleCell(3, 4, residual=True, activation_fn=getattr(m, name), rngs=nnx.Rngs(0))
            for name in ("relu", "sigmoid", "tanh")
        ]
        results.append(outcome(call, nnx.List(made), carry, x))
    assert len(ran) == 3
    assert_same(*results)


def test_a_subclass_of_a_cell_runs_its_own_call():
    class Twice(fcg.GRUCell):
        def __call__(self, carry, inputs):
            h, y = super().__call__(carry, inputs)
            return h, 2 * y

    cell, x = Twice(3, 4, rngs=nnx.Rngs(0)), array(2, 3, 3)
    h, y = fcg.RNN(cell, return_carry=True)(x)
    np.testing.assert_array_equal(y[:, -1], 2 * h)


@pytest.mark.smoke
def test_integers_a_broadcast_carry_and_autodiff_are_left_to_nnx(ran):
    ours, theirs = cells("GRUCell")
    for carry, x in (
        (jnp.ones((2, 4)), jnp.ones((2, 3), jnp.int32)),
        (jnp.ones((1, 4)), array(2, 3)),
        (jnp.ones((2, 4)), np.ones((2, 3))),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            ours(carry, x),
            theirs(carry, x),
        )
    assert len(ran) == 1  # the array of NumPy
    with fcg.use_autodiff():
        fcg.RNN(ours)(array(2, 3, 3))
    assert len(ran) == 1


def test_errors_are_those_of_nnx():
    for m in (fcg, nnx):
        cell = m.GRUCell(3, 4, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
            m.RNN(cell)(jnp.ones((2, 5, 6)))
        with pytest.raises(ValueError, match="RNGs must be provided"):
            cell.initialize_carry((2, 3))


# A model.


def test_convert_changes_the_layers_and_the_cells(ran):
    rnns = [nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(i)), rngs=False) for i in range(2)]
    model = nnx.Bidirectional(*rnns, rngs=False)
    carry, x = tuple(carry_of("GRUCell", 3) for _ in range(2)), array(3, 4, 3)

    def call(m, carry, x):
        return m(x, initial_carry=carry, return_carry=True, seq_lengths=jnp.asarray([4, 1, 2]))

    expected = outcome(call, model, carry, x)
    fcg.convert(model)
    assert type(model) is fcg.Bidirectional
    assert type(model.forward_rnn) is fcg.RNN
    assert type(model.backward_rnn.cell) is fcg.GRUCell
    assert type(model.backward_rnn.cell.dense_h) is fcg.Linear
    assert_same(outcome(call, model, carry, x), expected, exact=False)
    assert len(ran) == 2
    assert type(fcg.revert(model).forward_rnn.cell) is nnx.GRUCell


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_a_stack_of_cells_in_a_compiled_step(graph):
    """Made under nnx.vmap, run under nnx.vmap inside nnx.jit, in both modes of NNX."""
    mode, x, h = {"graph": graph, "graph_updates": graph}, array(2, 3, 4, 3), array(2, 3, 4)
    init = {"recurrent_kernel_init": nnx.initializers.normal(0.5)}  # orthogonal compiles for long

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return fcg.SimpleCell(3, 4, **init, rngs=nnx.Rngs(key))

    stack = make(jax.random.split(jax.random.key(0), 2))

    def loss(stack, h, x, rnn=fcg.RNN):
        def one(cell, h, x):
            return rnn(cell, rngs=False, return_carry=True)(x, initial_carry=h)

        return weighed(nnx.vmap(one, in_axes=(0, 0, 0), **mode)(stack, h, x))

    got = nnx.jit(nnx.grad(loss, **mode), **mode)(stack, h, x)
    theirs = fcg.revert(nnx.clone(stack))
    expected = nnx.jit(nnx.grad(lambda *args: loss(*args, nnx.RNN)))(theirs, h, x)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
