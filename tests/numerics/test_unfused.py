"""A part of a program that is computed once: in the compiled program, and under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.numerics.unfused import unfused

X = np.linspace(-1, 1, 8 * 34 * 64, dtype=np.float32).reshape(8, 34, 64)


def _window(x, factor):
    return x[:, :-2] * 2 + x[:, 1:-1] * 3 + x[:, 2:] * factor


_unfused_window = unfused(static_argnums=1)(_window)


def _normalized(window, x):
    y = window(x, 5.0) + jnp.arange(x.shape[-1])
    d = y - jnp.mean(y, -1, keepdims=True)
    return d * jax.lax.rsqrt(jnp.mean(d * d, -1, keepdims=True) + 1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA fuses on a CPU")
@pytest.mark.parametrize("times", [1, 2])
def test_what_several_passes_use_is_computed_once(times):
    def program(x):
        return [_normalized(_unfused_window, x * (1 + i)) for i in range(times)]

    compiled = jax.jit(program).lower(X).compile().as_text()
    assert compiled.count("constant(5)") == times


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA calls on a CPU")
def test_what_it_calls_itself_is_fused():
    @unfused(static_argnums=1)
    def window(x, factor):
        return jax.jit(_window, static_argnums=1)(x, factor) * 2

    compiled = jax.jit(lambda x: window(x, 5.0) + 1).lower(X).compile().as_text()
    assert compiled.count(" call(") == 1


@pytest.mark.parametrize("transform", ["grad", "vmap", "scan", "jvp"])
def test_it_is_the_function_itself_under_transformations(transform):
    def of(window):
        f = lambda x: jnp.sum(_normalized(window, x))  # noqa: E731
        return {
            "grad": lambda: jax.grad(f)(X),
            "vmap": lambda: jax.vmap(lambda x: window(x, 5.0), 2, 2)(X),
            "scan": lambda: jax.lax.scan(lambda c, x: (c + f(x[None]), None), 0.0, X)[0],
            "jvp": lambda: jax.jvp(f, (X,), (X,))[1],
        }[transform]

    np.testing.assert_allclose(of(_unfused_window)(), of(_window)(), rtol=1e-3, atol=1e-4)
