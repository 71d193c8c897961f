"""Half precision: gradients of scale and bias are summed in float32 and rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

# nnx.BatchNorm itself writes float64 statistics into float32 Variables.
pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")

NAMES = {"LayerNorm": (16,), "RMSNorm": (16,), "GroupNorm": (16, 4), "BatchNorm": (16,)}
SHAPE = (64, 8, 16)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("param_half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_scale_and_bias(name, half, param_half):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=SHAPE), half)
    g = jnp.asarray(np.abs(rng.normal(size=SHAPE)), half)  # of one sign: nothing cancels
    param_dtype = half if param_half else jnp.float32

    def gradients(dtype, param_dtype, x, g):
        layer = getattr(fcg, name)(
            *NAMES[name], dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
        layer.scale[...] = jnp.linspace(0.5, 2, 16).astype(half).astype(param_dtype)
        graphdef, state = nnx.split(layer)
        call = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
        grads, dx = jax.jit(lambda state, x, g: jax.vjp(call, state, x)[1](g))(state, x, g)
        return {**{n: grads[n][...] for n in ("scale", "bias") if n in grads}, "x": dx}

    got = gradients(half, param_dtype, x, g)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, g)]
        with fcg.use_autodiff():
            expected = gradients(jnp.float64, jnp.float64, *wide)
    for key, value in got.items():
        assert value.dtype == (x.dtype if key == "x" else param_dtype)
        a, b = (np.asarray(v, np.float64) for v in (value, expected[key]))
        allowed = 3e-3 if param_half or key == "x" else 1e-6
        assert np.linalg.norm(a - b) <= allowed * np.linalg.norm(b)
