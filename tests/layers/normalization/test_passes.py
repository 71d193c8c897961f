"""What XLA on a CPU makes of a normalization: the passes over its input, and what they store."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

SHAPES = {
    "LayerNorm": ((64,), (1024, 64)),
    "RMSNorm": ((64,), (1024, 64)),
    "GroupNorm": ((32, 8), (8, 16, 16, 32)),
    "InstanceNorm": ((32,), (8, 16, 16, 32)),
    "BatchNorm": ((32,), (8, 16, 16, 32)),
}
"""Arguments, and an input large enough for the textbook's sums."""


def lowered(name, dtype, backward=False, module=fcg):
    arguments, shape = SHAPES[name]
    layer = getattr(module, name)(*arguments, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)

    def forward(state, x):
        return nnx.merge(graphdef, state, copy=True)(x)

    def both(state, x, g):
        y, pull = jax.vjp(forward, state, x)
        return y, pull(g)

    x = jax.ShapeDtypeStruct(shape, dtype)
    program, operands = (both, (x, x)) if backward else (forward, (x,))
    return jax.jit(program).lower(state, *operands)


def compiled(name, dtype, backward=False):
    return lowered(name, dtype, backward).compile()


@pytest.mark.parametrize(("name", "most"), [("LayerNorm", 1.5), ("BatchNorm", 1.7)])
def test_a_program_holds_fewer_than_twice_as_many_operations_as_with_nnx(name, most, monkeypatch):
    """The branch with them: XLA takes time for each, and for each norm of a model."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    ours, theirs = (
        n_operations(lowered(name, jnp.float32, backward=True, module=module).as_text("hlo"))
        for module in (fcg, nnx)
    )
    assert ours < most * theirs


def n_operations(program):
    """Those of a program that compute; what a call of a function takes and returns is not."""
    passed = len(re.findall(r" (?:parameter|tuple|get-tuple-element|call)\(", program))
    return program.count(" = ") - passed


def test_layers_of_one_shape_are_lowered_once(monkeypatch):
    """A model of many of them takes less time to compile."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def n_lowered(n_layers):
        layers = [fcg.LayerNorm(64, rngs=nnx.Rngs(0)) for _ in range(n_layers)]
        graphdef, state = nnx.split(nnx.Sequential(*layers))

        def loss(state, x):
            return nnx.merge(graphdef, state)(x).sum()

        x = jnp.ones((1024, 64))
        return n_operations(jax.jit(jax.grad(loss)).lower(state, x).as_text("hlo"))

    n_of_two = n_lowered(2)
    assert n_lowered(8) < 1.2 * n_of_two


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_in_half_precision_stores_no_wide_copy(name, monkeypatch):
    """On one CPU each pass widens the input for itself, in the branch of exact statistics too."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    memory = compiled(name, jnp.bfloat16).memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 4 * math.prod(SHAPES[name][1])


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_in_half_precision_widens_its_input_in_each_pass(name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    text = compiled(name, jnp.bfloat16).as_text()
    entry = text[text.index("ENTRY") :]
    shape = ",".join(map(str, SHAPES[name][1]))
    assert f"= bf16[{shape}]" in entry
    assert f"= f32[{shape}]" not in entry


@pytest.mark.parametrize(
    ("name", "dtype", "copies"),
    [("RMSNorm", "float32", 0)]
    + [(name, "bfloat16", 1) for name in ("BatchNorm", "InstanceNorm", "GroupNorm")]
    + [(name, "bfloat16", 2) for name in ("RMSNorm", "LayerNorm")],
)
def test_passes_of_a_backward_share_no_wide_copy(name, dtype, copies, monkeypatch):
    """One in half precision is that of the forward, one more of the sums for scale and bias."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    memory = compiled(name, jnp.dtype(dtype), backward=True).memory_analysis()
    wide = 4 * math.prod(SHAPES[name][1])
    assert memory.temp_size_in_bytes < (copies + 0.5) * wide


@pytest.mark.parametrize(("name", "dtype"), [("RMSNorm", "float32"), ("LayerNorm", "bfloat16")])
def test_passes_that_wait_for_each_other_are_transformed(name, dtype, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.random.normal(jax.random.key(0), (3, 5, 64)).astype(dtype)
    v = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)

    def derivatives(module):
        layer = getattr(module, name)(64, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)

        def gradient(x):
            y, pull = jax.vjp(nnx.merge(graphdef, state, copy=True), x)
            return pull(jnp.sin(y))[0]

        twice = jax.vjp(gradient, x)[1](v)[0]
        of_each = jax.vmap(jax.checkpoint(gradient))(x)
        return [gradient(x), jax.jvp(gradient, (x,), (v,))[1], twice, of_each]

    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for ours, theirs in zip(derivatives(fcg), derivatives(nnx), strict=True):
        ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_no_pass_over_the_input_looks_up_a_group():
    text = compiled("GroupNorm", jnp.float32).as_text()
    passes = re.findall(r"^%fused_computation\S* \((.*)\) -> f32\[8,16,16,32\]", text, re.MULTILINE)
    assert passes
    for parameters in passes:
        assert "f32[8,1,1,8]" not in parameters
        assert "f32[8,8]" not in parameters
