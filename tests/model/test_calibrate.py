"""Calibrating a whole model: who observes what, and what stays as it was."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


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
    assert not first.activation.dynamic
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
    assert not model.used.layers[0].activation.dynamic
    assert model.unused.layers[0].activation.dynamic is None


def test_what_cannot_be_calibrated_is_said():
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
