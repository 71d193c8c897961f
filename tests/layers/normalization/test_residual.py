"""What the normalizations keep, and the choice between input and output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

NAMES = {
    "LayerNorm": ((64,), (128, 64)),
    "RMSNorm": ((64,), (128, 64)),
    "GroupNorm": ((32, 8), (8, 4, 8, 32)),
    "InstanceNorm": ((32,), (8, 4, 8, 32)),
    "BatchNorm": ((32,), (8, 4, 8, 32)),
}
by_name = pytest.mark.parametrize("name", NAMES)


def make(module, name, **kwargs):
    return getattr(module, name)(*NAMES[name][0], **kwargs, rngs=nnx.Rngs(0))


def pure(layer):
    graphdef, state = nnx.split(layer)
    return lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state


@pytest.mark.smoke
@by_name
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_what_is_kept_is_small(name, dtype):
    x = jnp.ones(NAMES[name][1], dtype)
    kept = {}
    for module, residual in ((fcg, "input"), (fcg, "output"), (nnx, None)):
        kwargs = {"residual": residual} if residual else {}
        fn, state = pure(make(module, name, dtype=dtype, **kwargs))
        kept[residual] = [r for r in fcg.residuals(fn, state, x) if not r.is_argument]
    sizes = {key: sum(r.nbytes for r in found) for key, found in kept.items()}
    assert max(r.nbytes for r in kept["input"]) <= x.nbytes / 8
    assert [r.nbytes for r in kept["output"] if r.shape == x.shape] == [x.nbytes]
    assert sizes["input"] < sizes[None] / 4


@by_name
@pytest.mark.parametrize(
    ("dtype", "arrays"), [(jnp.float32, 11.6), (jnp.bfloat16, 18.6)], ids=["float32", "bfloat16"]
)
def test_a_scan_over_layers_stacks_the_input_alone(name, dtype, arrays):
    """8 layers: nnx stacks 2 to 3 arrays of float32 each, ours one in the dtype of x."""
    x = jnp.ones(NAMES[name][1], dtype)

    def temp(module):
        fn, state = pure(make(module, name, dtype=dtype))
        stacked = jax.tree.map(lambda v: jnp.stack([v] * 8), state)

        def loss(stacked, x):
            y, _ = jax.lax.scan(lambda c, state: (fn(state, c), None), x, stacked)
            return jnp.sum(y.astype(jnp.float32))

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(stacked, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temp(fcg)
    assert ours < arrays * x.nbytes
    assert ours < temp(nnx) / 1.5


@by_name
def test_the_output_serves_as_well_as_the_input(name):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), NAMES[name][1], jnp.float64)
        losses, states = [], []
        for residual in ("input", "output"):
            kwargs = {"bias_init": nnx.initializers.normal(1.0)} if name != "RMSNorm" else {}
            layer = make(fcg, name, residual=residual, param_dtype=jnp.float64, **kwargs)
            layer.scale[...] = jnp.linspace(-2, 3, layer.scale.size)
            fn, state = pure(layer)
            losses.append(lambda state, x, fn=fn: jnp.sum(jnp.sin(fn(state, x))))
            states.append(state)

        @jax.jit
        def gradients(states, x):
            return [jax.grad(f, (0, 1))(s, x) for f, s in zip(losses, states, strict=True)]

        for a, b in zip(*map(jax.tree.leaves, gradients(states, x)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_the_output_is_shared_with_the_next_layer():
    """Then the normalization keeps nothing of its own beyond a few numbers per row."""
    norm = fcg.LayerNorm(64, residual="output", rngs=nnx.Rngs(0))
    linear = fcg.Linear(64, 64, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split((norm, linear))

    def fn(state, x):
        norm, linear = nnx.merge(graphdef, state)
        return linear(norm(x * 2))

    kept = [r for r in fcg.residuals(fn, state, jnp.ones((128, 64))) if not r.is_argument]
    assert [r.shape for r in kept].count((128, 64)) == 1


@by_name
def test_a_scale_of_zero_is_an_error_only_for_the_output(name):
    zeros = {"scale_init": nnx.initializers.zeros}
    x = jnp.ones(NAMES[name][1])
    fn, state = pure(make(fcg, name, **zeros))
    assert np.isfinite(jax.jit(fn)(state, x)).all()
    with pytest.raises(ValueError, match=r"is 0 for the features \[0, 1, .*use residual='input'"):
        make(fcg, name, residual="output", **zeros)
    layer = make(fcg, name, residual="output")
    layer.scale[...] = layer.scale[...].at[5].set(0)
    with pytest.raises(ValueError, match=r"is 0 for the features \[5\]: use residual='input'"):
        layer(x)


def test_a_traced_scale_of_zero_is_an_error_when_it_runs(capfd):
    fn, state = pure(make(fcg, "LayerNorm", residual="output"))
    state["scale"][...] = state["scale"][...].at[5].set(0)

    def loss(state, x):
        return jnp.sum(fn(state, x))

    def wait_for(f, *args):
        jax.block_until_ready(jax.jit(f)(*args))
        jax.effects_barrier()

    x = jnp.ones((128, 64))
    with pytest.raises(Exception, match=r"is 0 for the features \[5\]: use residual='input'"):
        wait_for(jax.grad(loss), state, x)
    wait_for(loss, state, x)  # nothing to recover outside of a derivative


def test_a_word_that_is_no_policy():
    with pytest.raises(ValueError, match="residual='x': expected 'input' or 'output'"):
        fcg.LayerNorm(6, residual="x", rngs=nnx.Rngs(0))


def test_converted_layers_keep_their_input_and_can_be_told_otherwise():
    layer = fcg.convert(nnx.LayerNorm(6, rngs=nnx.Rngs(0)))
    assert layer.residual == "input"
    layer.residual = "output"
    x = jax.random.normal(jax.random.key(0), (4, 6))
    expected = nnx.LayerNorm(6, rngs=nnx.Rngs(0))
    ours, theirs = (
        jax.jit(jax.grad(lambda x, m=m: jnp.sum(m(x) ** 3)))(x) for m in (layer, expected)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert type(fcg.revert(layer)) is nnx.LayerNorm
