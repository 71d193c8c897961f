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
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_scale_and_bias(name, half):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=SHAPE), half)
    g = jnp.asarray(np.abs(rng.normal(size=SHAPE)), half)  # of one sign: nothing cancels

    def gradients(dtypes, x, g):
        """For each dtype and dtype of the parameters, the gradients of parameters and of x."""
        layers = []
        for dtype, param_dtype in dtypes:
            layer = getattr(fcg, name)(
                *NAMES[name], dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
            )
            layer.scale[...] = jnp.linspace(0.5, 2, 16).astype(half).astype(param_dtype)
            layers.append(nnx.split(layer))

        @jax.jit
        def of_all(states, x, g):
            calls = [
                lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state, copy=True)(x)
                for graphdef, _ in layers
            ]
            return [jax.vjp(f, s, x)[1](g) for f, s in zip(calls, states, strict=True)]

        return [
            {**{n: grads[n][...] for n in ("scale", "bias") if n in grads}, "x": dx}
            for grads, dx in of_all([state for _, state in layers], x, g)
        ]

    got = gradients([(half, jnp.float32), (half, half)], x, g)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, g)]
        with fcg.use_autodiff():
            (expected,) = gradients([(jnp.float64, jnp.float64)], *wide)
    for param_dtype, found in zip((jnp.float32, half), got, strict=True):
        for key, value in found.items():
            assert value.dtype == (x.dtype if key == "x" else param_dtype)
            a, b = (np.asarray(v, np.float64) for v in (value, expected[key]))
            allowed = 3e-3 if param_dtype == half or key == "x" else 1e-6
            assert np.linalg.norm(a - b) <= allowed * np.linalg.norm(b)
