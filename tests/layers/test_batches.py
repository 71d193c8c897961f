"""Layers under vmap with parameters that all examples share: no gradient per example exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract import binding

IMAGES = (32, 2, 6, 6, 8)
LAYERS = {
    "Linear": (lambda m, rngs: m.Linear(8, 8, rngs=rngs), (32, 4, 8)),
    "LoRA": (lambda m, rngs: m.LoRA(8, 2, 8, rngs=rngs), (32, 4, 8)),
    "Embed": (lambda m, rngs: m.Embed(64, 8, rngs=rngs), (32, 4)),
    "LayerNorm": (lambda m, rngs: m.LayerNorm(8, rngs=rngs), (32, 4, 8)),
    "LayerNorm, two axes": (
        lambda m, rngs: m.LayerNorm(8, reduction_axes=(1, 2), feature_axes=2, rngs=rngs),
        (32, 3, 5, 8),
    ),
    "GroupNorm": (lambda m, rngs: m.GroupNorm(8, num_groups=2, rngs=rngs), (32, 4, 8)),
    "BatchNorm": (
        lambda m, rngs: m.BatchNorm(8, use_running_average=True, rngs=rngs),
        (32, 4, 8),
    ),
    "Conv": (lambda m, rngs: m.Conv(8, 8, (3, 3), rngs=rngs), IMAGES),
    "Conv, depthwise": (
        lambda m, rngs: m.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs),
        IMAGES,
    ),
}


@pytest.mark.skipif(not binding.HAS_PRIMITIVES, reason="jax.custom_vjp is mapped by JAX")
@pytest.mark.parametrize("name", LAYERS)
def test_a_mapped_axis_is_one_more_batch_axis(name):
    make, shape = LAYERS[name]
    x = jnp.arange(np.prod(shape)).reshape(shape)
    x = x % 64 if name == "Embed" else jnp.sin(x)

    def gradient(layer):
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params):
            y = jax.vmap(nnx.merge(graphdef, params, rest))(x)
            return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y)

        lowered = jax.jit(jax.grad(loss)).lower(params)
        return lowered.as_text(), lowered.compile()(params)

    theirs, ours = (make(module, nnx.Rngs(0)) for module in (nnx, fcg))
    program, got = gradient(ours)
    _, expected = gradient(theirs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-4 * float(jnp.abs(b).max()))
        per_example = "x".join(map(str, (len(x), *b.shape)))
        assert f"tensor<{per_example}xf32>" not in program
