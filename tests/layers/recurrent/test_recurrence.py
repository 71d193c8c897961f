"""`recurrence`: its formulas in float64, what it keeps, and its sums in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract import binding

NAMES = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")


def run(rnn, cell, x, carry):
    return rnn(cell, rngs=False, return_carry=True)(x, initial_carry=carry)


def carries(name, h):
    return (2 * h[::-1], h) if "LSTM" in name else h


@pytest.mark.parametrize("name", NAMES)
def test_formulas_in_float64(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, h = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 9, 3), (2, 4)))
        kwargs = {"param_dtype": jnp.float64, "bias_init": nnx.initializers.normal(1.0)}
        if name == "SimpleCell":
            kwargs |= {"residual": True, "dtype": jnp.float64}
        found = []
        for m in (fcg, nnx):
            cell = getattr(m, name)(3, 4, **kwargs, rngs=nnx.Rngs(0))
            graphdef, params = nnx.split(cell)

            @jax.jit
            def gradients(params, x, carry, graphdef=graphdef, m=m):
                def loss(params, x, carry):
                    out = run(m.RNN, nnx.merge(graphdef, params), x, carry)
                    return sum(
                        jnp.sum(jnp.sin(a) * jnp.cos(jnp.arange(a.size).reshape(a.shape)))
                        for a in jax.tree.leaves(out)
                    )

                return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, x, carry)

            found.append(jax.tree.leaves(gradients(params, x, carries(name, h))))
        for a, b in zip(*found, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


# How many arrays of the size of the outputs are kept beside inputs and parameters: the gates, the
# states, and for a GRU the product that r multiplies; nnx keeps more than as many again.
ARRAYS = {"LSTMCell": 6, "OptimizedLSTMCell": 6, "GRUCell": 5, "SimpleCell": 2}


def kept(m, name, batch=4, steps=32, features=64):
    cell = getattr(m, name)(features, features, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(cell)
    x, h = jnp.ones((batch, steps, features)), jnp.ones((batch, features))

    def outputs(params, x, carry):
        return run(m.RNN, nnx.merge(graphdef, params), x, carry)[1]

    found = fcg.residuals(outputs, params, x, carries(name, h))
    return sum(r.nbytes for r in found if not r.is_argument) / (4 * batch * steps * features)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name):
    assert kept(fcg, name) <= ARRAYS[name]
    assert kept(nnx, name) >= 1.5 * ARRAYS[name]


def temp(m, name):
    cell = getattr(m, name)(64, 64, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(cell)

    def loss(params, x):
        h = jnp.zeros((8, 64))
        return jnp.sum(run(m.RNN, nnx.merge(graphdef, params), x, carries(name, h))[1] ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, jnp.ones((8, 64, 64)))
    return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "GRUCell"])
def test_a_compiled_gradient_needs_no_more_memory(name):
    assert temp(fcg, name) < temp(nnx, name)


STEPS = 1024


def test_sums_over_time_in_bfloat16():
    """The kernels are 0, so that all gates are the same in every step, and the sums are known.

    The cotangent of each output reaches the bias through z and n, and the state of the step before
    through z = 1/2, which halves it: h stays 0, z is 1/2, n is 0. So db_n = sum_t l_t / 2 with
    l_t = g_t + l_{t+1} / 2, and dW_n is that times x.
    """
    made = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    zeros = dict.fromkeys(("kernel_init", "recurrent_kernel_init"), nnx.initializers.zeros)
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(np.abs(rng.standard_normal((1, STEPS, n))), jnp.bfloat16) for n in (3, 4))
    l, last = np.zeros((STEPS, 4)), np.zeros(4)
    for t in reversed(range(STEPS)):
        l[t] = last = np.asarray(g[0, t], np.float64) + last / 2
    db, dW = l.sum(0) / 2, np.asarray(x[0], np.float64).T @ l / 2
    errors = {}
    for m in (fcg, nnx):
        cell = m.GRUCell(3, 4, **made, **zeros)
        h = jnp.zeros((1, 4), jnp.bfloat16)

        def loss(cell, x, g, m=m, h=h):
            y = m.RNN(cell, rngs=False)(x, initial_carry=h)
            return jnp.sum(y.astype(jnp.float32) * g)

        dense = nnx.jit(nnx.grad(loss))(cell, x, g).dense_i
        errors[m] = [
            np.linalg.norm(np.asarray(d[...], np.float64)[..., -4:] - e) / np.linalg.norm(e)
            for d, e in ((dense.bias, db), (dense.kernel, dW))
        ]
    assert max(errors[fcg]) < 3e-3
    assert max(errors[nnx]) > 1e-2  # or this test shows nothing


@pytest.mark.skipif(not binding.HAS_PRIMITIVES, reason="jax.custom_vjp is mapped by JAX")
def test_a_mapped_axis_is_one_more_batch_axis():
    cell = fcg.GRUCell(8, 8, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(cell)
    x, h = jnp.ones((32, 2, 5, 8)), jnp.ones((32, 2, 8))

    def loss(params):
        cell = nnx.merge(graphdef, params)
        return jnp.sum(jax.vmap(lambda x, h: run(fcg.RNN, cell, x, h)[1])(x, h))

    assert "tensor<32x8x24xf32>" not in jax.jit(jax.grad(loss)).lower(params).as_text()


@pytest.mark.parametrize("configuration", ["dtype", "rank", "nan", "leaks"])
def test_configurations_of_jax(configuration):
    configurations = {
        "dtype": lambda: jax.numpy_dtype_promotion("strict"),
        "rank": lambda: jax.numpy_rank_promotion("raise"),
        "nan": lambda: jax.debug_nans(True),
        "leaks": jax.checking_leaks,
    }
    cell = fcg.OptimizedLSTMCell(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3, 3), jnp.bfloat16)
    with configurations[configuration]():
        h = jnp.ones((2, 4))
        jax.block_until_ready(
            nnx.grad(lambda m, x: jnp.sum(run(fcg.RNN, m, x, (h, h))[1]))(cell, x)
        )


def test_dtypes():
    """Of the computation, the parameters, the carry and the inputs; results are those of nnx."""
    half, single = jnp.bfloat16, jnp.float32
    init = dict.fromkeys(("kernel_init", "recurrent_kernel_init"), nnx.initializers.normal(0.5))
    cases = [
        (name, *dtypes)
        for name in ("OptimizedLSTMCell", "GRUCell")
        for dtypes in (
            (half, single, single, single),
            (None, single, single, half),
            (half, single, half, half),
            (None, half, single, single),
            (None, half, half, single),
        )
    ]

    @jax.jit
    def results(h, x):
        found = []
        for name, dtype, param_dtype, of_h, of_x in cases:
            made = {"dtype": dtype, "param_dtype": param_dtype, **init}
            for m in (fcg, nnx):
                cell = getattr(m, name)(3, 4, **made, rngs=nnx.Rngs(0))
                found.append(cell(carries(name, h.astype(of_h)), x.astype(of_x)))
        return found

    found = results(jnp.linspace(-1, 1, 8).reshape(2, 4), jnp.linspace(-1, 2, 6).reshape(2, 3))
    for case, ours, theirs in zip(cases, found[::2], found[1::2], strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert a.dtype == b.dtype, case
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2, err_msg=str(case))


@pytest.mark.parametrize("name", ["GRUCell", "MinGRU"])
@pytest.mark.parametrize("shape", ["b, 4, 3", "b, t, 3"])
def test_a_gradient_is_exported_for_any_batch_and_any_length(name, shape):
    """The operation takes any batch; a length that is not known is left to nnx, or scanned."""
    graphdef, state = nnx.split(getattr(fcg, name)(3, 4, rngs=nnx.Rngs(0)))

    def loss(state, x):
        h = jnp.zeros((x.shape[0], 4))
        return jnp.sum(run(fcg.RNN, nnx.merge(graphdef, state, copy=True), x, h)[1] ** 2)

    program = jax.jit(jax.value_and_grad(loss, argnums=1))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    exported = jax.export.export(program)(state, symbolic)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
    for found, expected in zip(exported.call(state, x), program(state, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
