"""Calibrating a whole model: who observes what, and what stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.stacked import unstack


def _quantized(linear):
    return fcg.QuantLinear.from_layer(
        linear, weight=fcg.FakeQuant(8, axis=-1), activation=fcg.FakeQuant(8)
    )


def _model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 4, rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(4, 2, rngs=rngs),
    )
    return fcg.convert(model, rules={nnx.Linear: _quantized})


BATCHES = [np.full((2, 4), 1.0, np.float32), np.full((2, 4), -3.0, np.float32)]


def test_activation_quantizers_record_the_widest_range():
    model = fcg.calibrate(_model(), BATCHES)
    first, last = model.layers[0], model.layers[3]
    assert first.activation.high[...].item() == 3
    assert first.activation.dynamic is False
    assert first.weight.dynamic
    assert type(first.activation) is fcg.FakeQuant
    # The second one saw what the first layer made of quantized values.
    seen = max(float(jnp.abs(first(b)).max()) for b in BATCHES)
    np.testing.assert_allclose(last.activation.high[...].item(), seen, rtol=1e-4)


def test_the_model_stays_in_its_mode_and_its_statistics_as_they_were():
    model = _model()
    before = model.layers[1].mean[...]
    fcg.calibrate(model, BATCHES, call=lambda m, batch: m(batch))
    assert not model.layers[1].use_running_average
    assert not model.layers[2].deterministic
    np.testing.assert_array_equal(model.layers[1].mean[...], before)


@pytest.mark.smoke
def test_a_quantizer_that_is_not_called_stays_dynamic():
    model = nnx.Dict(used=_model(), unused=_model())
    fcg.calibrate(model, BATCHES, call=lambda m, batch: m.used(batch))
    assert model.used.layers[0].activation.dynamic is False
    assert model.unused.layers[0].activation.dynamic is None


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(ValueError, match="inside a transformation: call it outside"):
        nnx.eval_shape(lambda: fcg.calibrate(_model(), BATCHES))
    with pytest.raises(ValueError, match="there was no batch"):
        fcg.calibrate(_model(), [])
    with pytest.raises(ValueError, match="used none of its quantizers"):
        fcg.calibrate(_model(), BATCHES, call=lambda m, batch: batch)
    with pytest.raises(ValueError, match="no activation quantizer"):
        fcg.calibrate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), BATCHES)
    model = _model()
    with pytest.raises(ZeroDivisionError):
        fcg.calibrate(model, BATCHES, call=lambda m, batch: 1 // 0)
    assert type(model.layers[0].activation) is fcg.FakeQuant


# Where a quantizer is called. Each calls a layer on every row of a batch, or all at once.


class Branch(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return nnx.cond(True, lambda layer, x: layer(x), lambda layer, x: 0 * x, self.layer, x)


WHERE = {
    "compiled": nnx.jit(lambda model, x: model(x)),
    "in a branch": lambda model, x: Branch(model)(x),
    "over examples": nnx.vmap(lambda model, x: model(x), in_axes=(None, 0)),
    "in a loop of JAX": lambda model, x: jax.lax.scan(lambda c, x: (c, model(x)), 0, x),
}
ROWS = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "graph"),
    [
        (lambda: fcg.FakeQuant(8), True),
        (lambda: fcg.FakeQuant(8, axis=-1), False),
        (lambda: fcg.FakeQuant(8, calibration="percentile", percentile=90.0), True),
        (lambda: fcg.LSQ(4, axis=-1), False),
    ],
    ids=["absmax", "channels", "percentile", "LSQ"],
)
def test_transformations_change_nothing(make, graph):
    def calibrated(call):
        model = fcg.QuantLinear(4, 4, activation=make(), rngs=nnx.Rngs(0))
        return jax.tree.leaves(nnx.state(fcg.calibrate(model, list(ROWS), call).activation))

    with nnx.set_graph_mode(graph):
        expected = calibrated(lambda model, x: model(x))
        for name, call in WHERE.items():
            for got, value in zip(calibrated(call), expected, strict=True):
                np.testing.assert_array_equal(got, value, err_msg=name)


@pytest.mark.parametrize("graph", [True, False])
def test_steps_of_time_and_stacked_layers(graph):
    with nnx.set_graph_mode(graph):
        rnn = nnx.RNN(nnx.SimpleCell(4, 4, rngs=nnx.Rngs(0)))
        fcg.convert(rnn, rules={nnx.Linear: _quantized})
        fcg.calibrate(rnn, [ROWS])
        np.testing.assert_allclose(rnn.cell.dense_i.activation.high[...], np.abs(ROWS).max())

        @nnx.vmap
        def make(key):
            return _quantized(nnx.Linear(4, 4, rngs=nnx.Rngs(key)))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        stack = make(jax.random.split(jax.random.key(0), 3))
        fcg.calibrate(stack, [ROWS[0]], lambda model, x: run(x, model))
        x = jnp.asarray(ROWS[0])
        for i, layer in unstack(stack, (3,)).items():
            np.testing.assert_allclose(
                layer.activation.high[...], jnp.abs(x).max(), rtol=1e-6, err_msg=str(i)
            )
            x = layer(x)
        np.testing.assert_allclose(run(ROWS[0], stack), x, rtol=1e-5, atol=1e-6)


# What a recorded range is that of.


def test_a_percentile_and_an_average_are_those_of_all_batches():
    batches = [np.full((2, 4), 1.0, np.float32), *(np.full((2, 4), 3.0, np.float32),) * 3]

    def recorded(**kwargs):
        layer = fcg.QuantLinear(4, 2, activation=fcg.FakeQuant(8, **kwargs), rngs=nnx.Rngs(0))
        return fcg.calibrate(layer, batches).activation.high[...]

    values = np.stack(batches).ravel()
    assert recorded(calibration="percentile", percentile=60.0) == np.percentile(values, 60) == 3
    assert recorded(calibration="moving_average") == 2.5
    # The last batch is often smaller.
    batches[-1] = np.full((1, 4), 3.0, np.float32)
    of_channels = recorded(calibration="percentile", percentile=60.0, axis=-1)
    np.testing.assert_array_equal(of_channels, np.percentile(np.concatenate(batches), 60, 0))


def test_ranges_of_examples_tokens_and_blocks_stay_dynamic():
    for kwargs in ({"axis": "token"}, {"axis": 0}, {"axis": -1, "block": 2}):
        layer = fcg.QuantLinear(4, 2, activation=fcg.FakeQuant(8, **kwargs), rngs=nnx.Rngs(0))
        both = nnx.Dict(per_example=layer, model=_model())
        fcg.calibrate(both, BATCHES, lambda m, x: (m.per_example(x), m.model(x)))
        assert layer.activation.dynamic
        assert layer(np.ones((1, 4), np.float32)).shape == (1, 2)
        with pytest.raises(ValueError, match="are dynamic and measure each array themselves"):
            fcg.calibrate(layer, BATCHES)
    static = fcg.QuantLinear(
        4, 2, activation=fcg.FakeQuant(8, axis="token", dynamic=False), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"axis=token and block=None has a range for each"):
        fcg.calibrate(static, BATCHES)
    static.activation.observe(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"shape \(2, 1\), which does not fit .* shape \(1, 4\)"):
        static(jnp.ones((1, 4)))


def test_calibrating_again_starts_anew():
    model = fcg.calibrate(_model(), [10 * BATCHES[0]])
    fcg.calibrate(model, BATCHES)
    assert model.layers[0].activation.high[...] == 3


def test_an_array_is_not_a_list_of_batches():
    with pytest.raises(TypeError, match=r"its rows would be taken for batches: write \[array\]"):
        fcg.calibrate(_model(), BATCHES[0])


def test_a_quantizer_that_is_switched_off_is_calibrated_and_not_packed():
    layer = fcg.QuantLinear(
        4, 2, weight=fcg.FakeQuant(4, axis=-1), activation=fcg.FakeQuant(8), rngs=nnx.Rngs(0)
    )
    layer.set_attributes(fcg.Quantizer, enabled=False)
    fcg.calibrate(layer, BATCHES)
    assert layer.activation.high[...] == 3
    assert not layer.activation.enabled
    with pytest.raises(ValueError, match="no layer of the model has a quantizer"):
        fcg.pack(layer)
