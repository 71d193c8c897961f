"""Batch normalizations folded into the layers before them: the outputs of eval mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def _norm(n, cls=nnx.BatchNorm, **kwargs):
    norm, rng = (
        cls(n, use_running_average=True, **kwargs, rngs=nnx.Rngs(0)),
        np.random.default_rng(0),
    )
    for name, low in {"mean": -2, "var": 0.1, "scale": -2, "bias": -2}.items():
        variable = getattr(norm, name)
        if variable is not None:
            variable.set_value(jnp.asarray(rng.uniform(low, 2, n), variable.dtype))
    return norm


LAYERS = {
    "linear": (lambda cls: cls.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)), (3, 4)),
    "conv, groups, mask": (
        lambda cls: cls.Conv(
            4,
            6,
            (3,),
            strides=2,
            feature_group_count=2,
            padding="CIRCULAR",
            mask=jnp.arange(36).reshape(3, 2, 6) % 5 > 0,
            bias_init=nnx.initializers.normal(),
            rngs=nnx.Rngs(0),
        ),
        (2, 5, 4),
    ),
    "conv, transposed": (
        lambda cls: cls.ConvTranspose(
            4, 6, (3, 2), strides=2, transpose_kernel=True, rngs=nnx.Rngs(0)
        ),
        (2, 3, 3, 4),
    ),
}


@nnx.jit
def _called(model, x):
    return model(x)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_those_of_layer_and_normalization(name):
    make, shape = LAYERS[name]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for module, norm in ((nnx, _norm(6)), (fcg, _norm(6, fcg.BatchNorm, use_scale=False))):
        layer = make(module)
        before = jax.tree.map(jnp.copy, nnx.state(layer))
        model = nnx.Sequential(layer, norm, nnx.relu)
        expected = _called(model, x)
        folded = fcg.fold_batch_norm(model)
        assert [type(f) for f in folded.layers[:1]] == [type(layer)]
        assert len(folded.layers) == 2
        np.testing.assert_allclose(_called(folded, x), expected, rtol=1e-4, atol=1e-5)
        by_hand = nnx.Sequential(fcg.fold_batch_norm(layer, norm), nnx.relu)
        np.testing.assert_array_equal(_called(by_hand, x), _called(folded, x))
        for a, b in zip(*map(jax.tree.leaves, (nnx.state(layer), before)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_nested_sequences_stacks_and_a_model_in_train_mode():
    @nnx.vmap
    def make(key):
        rngs = nnx.Rngs(key)
        return nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs),
            nnx.relu,
            nnx.Linear(4, 4, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
        )

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return block(x)

    stack = make(jax.random.split(jax.random.key(0), 3))
    norm = stack.layers[3]
    norm.mean.set_value(jax.random.normal(jax.random.key(1), (3, 4)))
    folded = fcg.fold_batch_norm({"blocks": stack})["blocks"]
    assert len(folded.layers) == 3
    x = jnp.ones((2, 4))
    stack.eval()
    np.testing.assert_allclose(run(x, folded), run(x, stack), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_folded_is_said():
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(4, 6, rngs=rngs)
    with pytest.raises(ValueError, match="no BatchNorm follows a Linear, Conv or ConvTranspose"):
        fcg.fold_batch_norm(nnx.Sequential(linear, nnx.relu, _norm(6)))
    with pytest.raises(ValueError, match=r"statistics of shape \(5,\), and a Linear 6 output"):
        fcg.fold_batch_norm(linear, _norm(5))
    with pytest.raises(ValueError, match="normalizes axis=1, and the features"):
        fcg.fold_batch_norm(linear, nnx.BatchNorm(6, axis=1, rngs=rngs))
    with pytest.raises(TypeError, match="norm is a LayerNorm, write an nnx"):
        fcg.fold_batch_norm(linear, nnx.LayerNorm(6, rngs=rngs))
    quantized = fcg.QuantLinear(4, 6, weight=fcg.FakeQuant(4), rngs=rngs)
    with pytest.raises(TypeError, match=r"a QuantLinear is no Linear.*fold before you turn"):
        fcg.fold_batch_norm(quantized, _norm(6))
    square = nnx.Linear(6, 6, rngs=rngs)
    with pytest.raises(ValueError, match="a Linear before a BatchNorm is held at layers/0 and"):
        fcg.fold_batch_norm(nnx.Sequential(square, _norm(6), square))
