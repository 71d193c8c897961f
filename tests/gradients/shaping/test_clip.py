"""Clipping by value and by norm: at the limit, at extremes, and where nothing is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import flax_customgrad as fcg


def clipped(*cases):
    """What becomes of cotangents: pairs of one and of the limits of `gradient_clip`."""
    cotangents = [g for g, _ in cases]

    @jax.jit
    def of_all(cotangents):
        return [
            (y, *pull(g))
            for g, (_, limits) in zip(cotangents, cases, strict=True)
            for y, pull in [
                jax.vjp(lambda x, limits=limits: fcg.gradient_clip(x, **limits), jnp.ones_like(g))
            ]
        ]

    gradients = []
    for g, (y, dx) in zip(cotangents, of_all(cotangents), strict=True):
        np.testing.assert_array_equal(np.float32(y), np.ones(g.shape))
        assert (dx.shape, dx.dtype, y.dtype) == (g.shape, g.dtype, g.dtype)
        gradients.append(dx)
    return gradients


def test_by_value_in_float64():
    with jax.enable_x64(True):
        g = 3 * np.random.default_rng(0).standard_normal((4, 3))
        limits = (0.7, np.array([0.1, 1.0, 10.0]))
        for limit, dx in zip(
            limits, clipped(*((g, {"max_value": c}) for c in limits)), strict=True
        ):
            np.testing.assert_allclose(dx, np.clip(g, -limit, limit), rtol=1e-12, atol=0)


def test_by_norm_in_float64():
    with jax.enable_x64(True):
        g = np.random.default_rng(0).standard_normal((4, 3, 2))
        cases, expected = [], []
        for batch_axes in ((), 0, (0, 1), -1, (0, -1), (0, 1, 2)):
            batch = np.atleast_1d(np.array(batch_axes, int)) % 3
            axes = tuple(i for i in range(3) if i not in batch)
            norm = np.sqrt((g**2).sum(axes, keepdims=True))
            limit = float(np.median(norm)) * (1 if norm.size > 1 else 0.5)
            cases.append((g, {"max_norm": limit, "batch_axes": batch_axes}))
            expected.append(g * np.minimum(1, limit / norm))
            assert (expected[-1] != g).any()
        for dx, e in zip(clipped(*cases), expected, strict=True):
            np.testing.assert_allclose(dx, e, rtol=1e-12, atol=0)


@pytest.mark.smoke
def test_what_is_at_the_limit_passes_to_the_bit():
    g = np.float32([3.0, -4.0])
    got = clipped((g, {"max_norm": 5.0}), (g, {"max_value": 4.0}), (g, {"max_value": 3.0}))
    np.testing.assert_array_equal(got, [g, g, [3, -3]])

    # jnp.clip has the derivative 1/2 there.
    def slope(x):
        return jax.grad(lambda x: fcg.gradient_clip(x, max_value=2.0) ** 2)(x)

    assert jax.jit(jax.grad(slope))(1.0) == 2


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
def test_the_norm_neither_overflows_nor_vanishes(dtype):
    half_range = dtype == jnp.float16
    scales = (1e-6, 1e-4, 1.0, 6e4) if half_range else (1e-30, 1e-4, 1.0, 6e4, 1e30, 3e38)
    signs = np.resize([-1.0, 1.0], 64)
    cases = [
        (np.asarray(scale * signs, dtype), {"max_norm": limit})
        for scale in scales
        for limit in (1e-3, 1.0)
    ]
    for (g, limits), got in zip(cases, clipped(*cases), strict=True):
        exact = np.asarray(g, np.float64)
        expected = exact * min(1, limits["max_norm"] / np.linalg.norm(exact))
        rtol = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rtol)


def test_one_norm_of_many():
    (dx,) = clipped((np.full((1 << 16,), 1e20, np.float32), {"max_norm": 1.0}))
    np.testing.assert_allclose(dx, 1 / 256, rtol=1e-5)


def test_zeros_empty_arrays_and_integers():
    choices = ({"max_value": 1.0}, {"max_norm": 1.0}, {"max_norm": 1.0, "batch_axes": 0})
    shapes = ((2, 3), (2, 0), (0, 2))
    cases = [(np.zeros(shape, np.float32), limits) for limits in choices for shape in shapes]
    for (zeros, _), dx in zip(cases, clipped(*cases), strict=True):
        np.testing.assert_array_equal(dx, zeros)
    x = jnp.arange(6).reshape(2, 3)
    assert all(fcg.gradient_clip(x, **limits) is x for limits in choices)

    def of_gradients(x):
        losses = [lambda x, c=c: jnp.sum(fcg.gradient_clip(x, **c) ** 2) for c in choices]
        return sum(jnp.sum(jax.grad(loss)(x)) for loss in losses)

    assert np.isfinite(jax.jit(jax.grad(of_gradients))(np.zeros((2, 3)))).all()


def test_what_is_not_finite():
    g = np.float32([np.inf, -np.inf, np.nan, 3.0, 0.5])
    rows = np.float32([[np.inf, 1.0], [np.nan, 5.0], [3.0, 4.0]])
    by_value, by_norm, of_rows, to_infinity = clipped(
        (g, {"max_value": 1.0}),
        (g, {"max_norm": 1.0}),
        (rows, {"max_norm": 1.0, "batch_axes": 0}),
        (rows[2:], {"max_norm": float("inf")}),
    )
    np.testing.assert_array_equal(by_value, [1, -1, np.nan, 1, 0.5])
    np.testing.assert_array_equal(by_norm, g)
    np.testing.assert_allclose(of_rows, [[np.inf, 1], [np.nan, 5], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(to_infinity, rows[2:])


def test_limits_traced_scheduled_and_batched():
    layer = fcg.GradientClip(max_norm=lambda step: 1.0 / step, batch_axes=0)
    by_value = fcg.GradientClip(max_value=jnp.array([1.0, 2.0]))

    def gradients(x, row, layer, step, limits):
        scheduled = nnx.grad(lambda x, layer: jnp.sum(layer(x, step) * 3))(x, layer)
        of_example = jax.grad(lambda x, c: jnp.sum(fcg.gradient_clip(x, max_norm=c) * 3))
        of_row = jax.grad(lambda x: jnp.sum(by_value(x) * 3))(row)
        return scheduled, jax.vmap(of_example)(x, limits), of_row

    x, row, limits = np.ones((2, 1), np.float32), np.ones(2), np.float32([1, 2])
    scheduled, batched, of_row = nnx.jit(gradients)(x, row, layer, jnp.float32(4), limits)
    np.testing.assert_allclose(scheduled, x / 4)
    np.testing.assert_allclose(batched, [[1], [2]])
    np.testing.assert_array_equal(of_row, [1, 2])


def test_on_a_mesh_the_norm_is_the_whole_one():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split = jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, PartitionSpec("data")))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fcg.gradient_clip(x, max_norm=1.0) ** 2)))(split)
    np.testing.assert_allclose(gradient, 1 / np.sqrt(32), rtol=1e-6)
    assert gradient.sharding == split.sharding


@pytest.mark.parametrize(
    "make", [fcg.GradientClip, lambda **how: fcg.gradient_clip(jnp.ones((2, 3)), **how)]
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="takes max_value or max_norm, and neither was given"):
        make()
    with pytest.raises(ValueError, match="takes max_value or max_norm, and both was given"):
        make(max_value=1.0, max_norm=1.0)
    with pytest.raises(ValueError, match=r"batch_axes=0 says .* max_value has no use for it"):
        make(max_value=1.0, batch_axes=0)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"max_norm={bad} must be positive"):
            make(max_norm=bad)
    with pytest.raises(TypeError, match="max_value is '1', a str; write a number"):
        make(max_value="1")


def test_what_does_not_fit_x():
    x = jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"max_norm has shape \(3,\); write a number or an array with"
    ):
        fcg.gradient_clip(x, max_norm=jnp.ones(3))
    with pytest.raises(ValueError, match=r"max_value has shape \(2,\), which does not broadcast"):
        fcg.gradient_clip(x, max_value=jnp.ones(2))
    with pytest.raises(ValueError, match=r"batch_axes=\(0, 2\) names an axis that x, of 2 axes"):
        fcg.gradient_clip(x, max_norm=1.0, batch_axes=(0, 2))
    with pytest.raises(TypeError, match="x is an array of complex64; it clips real gradients"):
        fcg.gradient_clip(x * 1j, max_norm=1.0)
    with pytest.raises(TypeError, match=r"GradientClip: max_value is a schedule.*layer\(x, step\)"):
        fcg.GradientClip(max_value=lambda step: step)(x)


@pytest.mark.parametrize("axes", [np.int64(0), jnp.int32(0), np.array([0]), [0], -2])
def test_batch_axes_in_any_form(axes):
    x = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    layer = fcg.GradientClip(max_norm=1.0, batch_axes=axes)
    gradient = jax.grad(lambda x: jnp.sum(layer(x) ** 2) / 2)(x)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)


def test_each_array_of_a_tree_has_a_norm_of_its_own():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])}
    layer = fcg.GradientClip(max_norm=nnx.Variable(jnp.float32(1)))
    gradient = jax.grad(lambda t: sum(jnp.sum(a**2) / 2 for a in jax.tree.leaves(layer(t))))(tree)
    np.testing.assert_allclose(gradient["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(gradient["b"], tree["b"], rtol=1e-6)
