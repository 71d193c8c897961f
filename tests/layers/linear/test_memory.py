"""What the backwards of the linear family keep: the input and the parameters, no copies."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg

BF16 = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
MADE = {
    "Linear": (lambda m: m.Linear(64, 32, **BF16), (16, 64)),
    "LinearGeneral": (lambda m: m.LinearGeneral(64, (4, 8), **BF16), (16, 64)),
    "Einsum": (lambda m: m.Einsum("ab,bcd->acd", (64, 4, 8), (4, 8), **BF16), (16, 64)),
    "LoRA": (lambda m: m.LoRA(64, 2, 32, **BF16), (16, 64)),
}


def kept(layer, x):
    graphdef, params = nnx.split(layer)
    fn = lambda params, x: nnx.merge(graphdef, params)(x)  # noqa: E731
    return [r for r in fcg.residuals(fn, params, x) if not r.is_argument]


@pytest.mark.parametrize("cls", MADE)
def test_nothing_is_kept_but_what_the_caller_holds(cls):
    make, shape = MADE[cls]
    x = jnp.ones(shape, jnp.bfloat16)
    ours = kept(make(fcg), x)
    if cls == "LoRA":  # and the rank-wide product
        assert [(r.shape, r.dtype) for r in ours] == [((16, 2), jnp.bfloat16)]
    else:
        assert ours == []
    assert sum(r.nbytes for r in kept(make(nnx), x)) > sum(r.nbytes for r in ours)


def test_embed_keeps_the_ids():
    layer, ids = fcg.Embed(64, 32, **BF16), jnp.arange(16)
    graphdef, params = nnx.split(layer)
    found = fcg.residuals(lambda params: nnx.merge(graphdef, params)(ids), params)
    assert [(r.shape, r.dtype) for r in found] == [((16,), jnp.int32)]


def test_the_compiled_scan_over_layers_needs_less_memory():
    """Eight layers in bfloat16 with float32 parameters; nnx keeps a bf16 copy of each kernel."""

    def temp(module):
        @nnx.vmap(in_axes=(0,))
        def make(key):
            return module.Linear(256, 256, dtype=jnp.bfloat16, rngs=nnx.Rngs(key))

        graphdef, params = nnx.split(make(jax.random.split(jax.random.key(0), 8)))

        def loss(params, x):
            def body(x, params):
                return nnx.merge(graphdef, params)(x), None

            return jnp.sum(jax.lax.scan(body, x, params)[0].astype(jnp.float32))

        x = jnp.ones((64, 256), jnp.bfloat16)
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(fcg) < temp(nnx) - 8 * 256 * 256 * 2 * 0.9
