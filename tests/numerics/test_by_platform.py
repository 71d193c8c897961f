"""by_platform: as `jax.lax.platform_dependent` in every transformation, traced once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.numerics.by_platform import by_platform


def on_cpu(x, w):
    return {"y": jnp.sin(x) @ w}, jnp.sum(x)


def elsewhere(x, w):
    return {"y": jnp.dot(jnp.sin(x), w)}, x.sum()


ours = functools.partial(by_platform, cpu=on_cpu, default=elsewhere)
theirs = functools.partial(lax.platform_dependent, cpu=on_cpu, default=elsewhere)
x = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)
w = np.linspace(2, -1, 8, dtype=np.float32).reshape(4, 2)

TRANSFORMED = {
    "eager": lambda f: f(x, w),
    "jit": lambda f: jax.jit(f)(x, w),
    "jvp": lambda f: jax.jvp(f, (x, w), (x + 1, w * 2)),
    "jvp of one": lambda f: jax.jvp(lambda x: f(x, w), (x,), (x + 1,)),
    "vjp": lambda f: jax.vjp(f, x, w)[1](({"y": jnp.ones((3, 2))}, jnp.ones(()))),
    "vmap": lambda f: jax.vmap(f, (0, None))(x[:, None], w),
    "vmap of another axis": lambda f: jax.vmap(f, (None, 1))(x, w[:, :, None]),
    "grad of remat": lambda f: jax.grad(jax.checkpoint(lambda x: f(x, w)[0]["y"].sum()))(x),
    "transpose": lambda f: jax.linear_transpose(lambda w: f(x, w)[0], w)({"y": x[:, :2]}),
    "scan": lambda f: lax.scan(lambda c, x: (c + f(x[None], w)[1], x), 0.0, x),
    "hessian": lambda f: jax.hessian(lambda x: f(x[None], w)[0]["y"].sum())(x[0]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_is_platform_dependent(name):
    apply = TRANSFORMED[name]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), apply(ours), apply(theirs)
    )


def test_one_computation_is_traced_and_lowered():
    def default(x, w):
        raise AssertionError("traced")

    f = functools.partial(by_platform, cpu=on_cpu, default=default)
    lowered = jax.jit(f).lower(x, w)
    assert "case" not in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(x, w)[1], x.sum(), rtol=1e-6)


def test_a_program_chooses_where_it_runs():
    f = functools.partial(by_platform, cpu=lambda x: jnp.sin(x), default=lambda x: jnp.cos(x))

    def exported(*platforms):
        return jax.export.export(jax.jit(f), platforms=platforms)(x).mlir_module()

    computations = {"stablehlo.sine", "stablehlo.cosine"}
    for platforms, expected in (
        (["cpu"], {"stablehlo.sine"}),
        (["cuda"], {"stablehlo.cosine"}),
        (["cpu", "tpu"], computations),
    ):
        module = exported(*platforms)
        assert {word for word in computations if word in module} == expected


def test_it_varies_over_the_axes_of_a_shard_map():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_rows = PartitionSpec("i"), PartitionSpec()

    def mapped(f):
        def local(x, w):
            y, total = f(x, w)
            return y, total[None]

        call = jax.shard_map(local, mesh=mesh, in_specs=(rows, all_rows), out_specs=rows)
        return jax.value_and_grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(call(x, w)))))(x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mapped(ours), mapped(theirs)
    )


def test_arrays_are_arguments():
    with pytest.raises(TypeError, match="make it an argument"):
        jax.jit(lambda x: by_platform(x, cpu=lambda y: x + y, default=lambda y: x + y))(x)
