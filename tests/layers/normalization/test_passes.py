"""What XLA on a CPU makes of a normalization: the passes over its input, and what they store."""

import re

import jax
import jax.numpy as jnp
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


def compiled(name, dtype):
    arguments, shape = SHAPES[name]
    layer = getattr(fcg, name)(*arguments, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    forward = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    return jax.jit(forward).lower(state, jax.ShapeDtypeStruct(shape, dtype)).compile()


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_in_half_precision_stores_one_wide_copy_at_most(name, monkeypatch):
    """On one CPU the branch of the exact statistics takes the input as it came."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    wide = 4 * 2**16
    assert compiled(name, jnp.bfloat16).memory_analysis().temp_size_in_bytes < 1.2 * wide


def test_no_pass_over_the_input_looks_up_a_group():
    text = compiled("GroupNorm", jnp.float32).as_text()
    passes = re.findall(r"^%fused_computation\S* \((.*)\) -> f32\[8,16,16,32\]", text, re.MULTILINE)
    assert passes
    for parameters in passes:
        assert "f32[8,1,1,8]" not in parameters
        assert "f32[8,8]" not in parameters
