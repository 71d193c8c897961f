"""A model that is built anew takes what was saved of one that was calibrated and packed."""

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flax_customgrad as fcg

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Network(nnx.Module):
    """A quantizer that records one range, one that averages, one that learns, and none."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


ACTIVATIONS = {
    "0": lambda: fcg.FakeQuant(8),
    "1": lambda: fcg.FakeQuant(8, symmetric=False, calibration="moving_average"),
    "2": lambda: fcg.LSQ(4, signed=False),
    "3": lambda: fcg.FakeQuant(8, axis="token"),
}


def _quantized(seed):
    def rule(name):
        return lambda layer: fcg.QuantLinear.from_layer(
            layer, weight=fcg.FakeQuant(4, axis=-1), activation=ACTIVATIONS[name]()
        )

    rules = [fcg.Rule(nnx.Linear, rule(name), where=f"layers/{name}") for name in ACTIVATIONS]
    return fcg.convert(Network(seed), rules=rules)


@nnx.jit
def _forward(model, x):
    return model(x)


def _by_update(saved, fresh, folder):
    nnx.update(fresh, nnx.state(saved))


def _by_serialization(saved, fresh, folder):
    data = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(saved)))
    state = nnx.state(fresh)
    pure = flax.serialization.from_bytes(nnx.to_pure_dict(state), data)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(fresh, state)


def _by_orbax(saved, fresh, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "model", nnx.state(saved))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "model", nnx.state(fresh))
    nnx.update(fresh, restored)


@pytest.mark.parametrize(
    ("restore", "graph"), [(_by_update, False), (_by_serialization, True), (_by_orbax, False)]
)
@pytest.mark.parametrize("finish", [fcg.pack, lambda model: model], ids=["packed", "trained on"])
def test_a_fresh_model_takes_what_was_calibrated(restore, graph, finish, tmp_path):
    with nnx.set_graph_mode(graph):
        saved = finish(fcg.calibrate(_quantized(0), [X[:4], X[4:]]))
        fresh = finish(_quantized(1))
        restore(saved, fresh, tmp_path)
        for model in (saved, fresh):
            model.eval()
        # Beyond the recorded range, which a range of this input would not be.
        np.testing.assert_array_equal(_forward(fresh, 3 * X), _forward(saved, 3 * X))


def test_a_checkpoint_without_a_target_brings_ranges_of_channels(tmp_path):
    def make(seed):
        quantizers = {"activation": fcg.FakeQuant(8, axis=-1), "weight": fcg.LSQ(4, axis=-1)}
        return fcg.QuantLinear(6, 3, **quantizers, rngs=nnx.Rngs(seed))

    saved, fresh = fcg.calibrate(make(0), [X]), make(1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(saved)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model")
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(fresh, state)
    np.testing.assert_array_equal(_forward(fresh, 3 * X), _forward(saved, 3 * X))


def test_an_abstract_model_says_what_to_restore():
    abstract = nnx.eval_shape(lambda: fcg.pack(_quantized(1)))
    saved = fcg.pack(fcg.calibrate(_quantized(0), [X]))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(m)) for m in (abstract, saved)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
