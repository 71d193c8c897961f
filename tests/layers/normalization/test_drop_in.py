"""The normalizations take the place of nnx's: constructor, parameters, results, gradients."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

# nnx.BatchNorm itself writes float64 statistics into float32 Variables.
pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")

NAMES = ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"]
SIZES = {"GroupNorm": (6, 3)}
SCALED = {"scale_init": nnx.initializers.normal(1.0)}


def make(module, name, *args, **kwargs):
    args = args or SIZES.get(name, (6,))
    return getattr(module, name)(*args, **{**SCALED, **kwargs}, rngs=nnx.Rngs(0))


def results(*cases):
    """For each case (layer, x, what else it is called with), computed in one program: the output,
    running statistics, and the gradients of all parameters and of x."""

    def of_one(layer, x, kwargs):
        graphdef, state = nnx.split(layer)

        def loss(state, x):
            m = nnx.merge(graphdef, state, copy=True)
            y = m(x, **kwargs)
            weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
            return jnp.sum(weights * y.astype(jnp.promote_types(y.dtype, jnp.float32)) ** 2), (
                y,
                nnx.state(m, nnx.BatchStat),
            )

        return jax.value_and_grad(loss, (0, 1), has_aux=True), (state, x)

    functions, args = zip(*(of_one(*case) for case in cases), strict=True)
    found = jax.jit(lambda args: [f(*a) for f, a in zip(functions, args, strict=True)])(args)
    return [jax.tree.leaves((aux, grads)) for (_, aux), grads in found]


def of_both(cases):
    """The results of cases (name, arguments, x, how to call), of our layers beside those of nnx."""
    made = [
        (make(module, name, *args, **kwargs), x, call)
        for module in (fcg, nnx)
        for name, args, kwargs, x, call in cases
    ]
    found = results(*made)
    return zip(found[: len(cases)], found[len(cases) :], strict=True)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.max(np.abs(a - b), initial=0) <= tolerance * max(np.max(np.abs(b), initial=0), 1)


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_layer_of_nnx(name):
    ours, theirs = getattr(fcg, name), getattr(nnx, name)
    assert issubclass(ours, theirs)
    parameters = [list(inspect.signature(c.__call__).parameters) for c in (ours, theirs)]
    assert parameters[0] == parameters[1]
    *_, residual = inspect.signature(ours).parameters.values()
    assert (residual.name, residual.default) == ("residual", "input")
    layers = [make(m, name, use_scale=True) for m in (fcg, nnx)]
    assert vars(layers[0]).keys() == vars(layers[1]).keys()
    states = [nnx.state(layer) for layer in layers]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name):
    floats = (jnp.float32, jnp.float16)
    halves = itertools.product(floats, (None, jnp.bfloat16), (jnp.float32, jnp.bfloat16))
    x = jax.random.normal(jax.random.key(0), (4, 5, 6))
    cases = [
        (name, (), {"dtype": dtype, "param_dtype": param_dtype}, x.astype(x_dtype), {})
        for x_dtype, dtype, param_dtype in halves
    ]
    for (_, _, kwargs, x, _), (ours, theirs) in zip(cases, of_both(cases), strict=True):
        half = jnp.bfloat16 in kwargs.values() or x.dtype == jnp.float16
        assert_close(ours, theirs, 6e-2 if half else 2e-6)


# Reduced axes with and without features, features that are not reduced, sizes of 1, no batch axis.
AXES = [
    ((2, 3, 4), (2,), (2,)),
    ((2, 3, 4), (0, 1), (2,)),
    ((2, 3, 4), (1, 2), (0, 1)),
    ((3, 1, 4), (0, 1, 2), (1,)),
    ((3, 1, 4), (1,), (0, 2)),
    ((1, 2, 3), (0, 2), (0, 1, 2)),
]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("masked", [False, True])
def test_any_axes_agree_with_autodiff_of_nnx(name, masked):
    with jax.enable_x64(True):
        cases = []
        for i, (shape, reduced, features) in enumerate(AXES):
            x = 1 + jax.random.normal(jax.random.key(i), shape)
            kwargs = {"use_scale": i != 1, "param_dtype": jnp.float64, "epsilon": 0.1}
            if name == "LayerNorm":
                kwargs["use_bias"] = i not in (1, 2)
            kwargs |= {"reduction_axes": reduced, "feature_axes": tuple(a - 3 for a in features)}
            # The first element of each statistic is never masked: nnx returns NaN where all are.
            mask = jax.random.bernoulli(jax.random.key(1), 0.6, shape)
            mask |= sum(jnp.indices(shape)[a] for a in reduced) == 0
            size = int(np.prod([shape[a] for a in features]))
            cases.append((name, (size,), kwargs, x, {"mask": mask} if masked else {}))
        for ours, theirs in of_both(cases):
            assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm", "BatchNorm"])
def test_any_shape_agrees_with_autodiff_of_nnx(name):
    with jax.enable_x64(True):
        cases = []
        for shape, masked in itertools.product([(3, 6), (2, 3, 6), (2, 3, 1, 6)], (False, True)):
            x = 1 + jax.random.normal(jax.random.key(0), shape)
            mask = jax.random.bernoulli(jax.random.key(1), 0.6, shape)
            if name == "GroupNorm":
                mask = mask.at[..., ::2].set(True)
            else:
                mask = jnp.broadcast_to(mask[..., :1], shape)
            # The first element of each statistic is never masked: nnx returns NaN where all are.
            if name == "InstanceNorm":
                mask = mask.at[(slice(None), *[0] * (x.ndim - 2))].set(True)
            if name == "BatchNorm":
                mask = mask.at[(0,) * (x.ndim - 1)].set(True)
            kwargs = {"param_dtype": jnp.float64, "epsilon": 0.1}
            cases.append((name, (), kwargs, x, {"mask": mask} if masked else {}))
        for ours, theirs in of_both(cases):
            assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("evaluation", [False, True])
def test_batch_norm_along_any_axis(evaluation):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (3, 4, 5))
        cases = []
        for module, axis in itertools.product((fcg, nnx), (0, 1, -1)):
            size = x.shape[axis]
            kwargs = {"axis": axis, "param_dtype": jnp.float64, "use_running_average": evaluation}
            layer = make(module, "BatchNorm", size, **kwargs)
            layer.mean[...] = jnp.linspace(-1, 1, size)
            layer.var[...] = jnp.linspace(0.5, 2, size)
            cases.append((layer, x, {}))
        found = results(*cases)
        for ours, theirs in zip(found[:3], found[3:], strict=True):
            assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_single(name):
    shapes = [(0, 6), (4, 0, 6), (1, 6), (1, 1, 6), (2, 3, 1, 6)]
    cases = [
        (name, (), {"use_scale": use_scale}, jax.random.normal(jax.random.key(0), shape), {})
        for use_scale, shape in itertools.product((False, True), shapes)
    ]
    for ours, theirs in of_both(cases):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.isfinite(a).all()
            if np.isfinite(b).all():
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_group_norm_gives_each_group_its_own_statistics():
    """With axes that nnx gets wrong: it repeats the statistics along axis 1."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6)) * jnp.arange(1, 7)
    for reduced, over in (((2, 3), (2, 4)), ((3,), (4,)), ((0, 1, 2, 3), (0, 1, 2, 4))):
        layer = nnx.jit(fcg.GroupNorm(6, 3, reduction_axes=reduced, rngs=nnx.Rngs(0)))
        split = np.asarray(x, np.float64).reshape(2, 3, 4, 3, 2)
        centered = split - split.mean(over, keepdims=True)
        expected = centered / np.sqrt((centered**2).mean(over, keepdims=True) + 1e-6)
        np.testing.assert_allclose(layer(x), expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


def halved(arrays, *, dtype=None, inexact=True):
    return tuple(None if a is None else a / 2 for a in arrays)


@pytest.mark.parametrize("name", NAMES)
def test_injected_promotion_integers_and_autodiff_are_computed_by_nnx(name):
    x = jax.random.normal(jax.random.key(0), (4, 6))
    integers = jnp.arange(24).reshape(4, 6)

    @jax.jit
    def outputs(x, integers):
        return [
            (make(m, name, promote_dtype=halved)(x), make(m, name)(integers)) for m in (fcg, nnx)
        ]

    jax.tree.map(np.testing.assert_array_equal, *outputs(x, integers))

    def traced():  # the layer is made inside, because BatchNorm writes to itself
        return str(jax.make_jaxpr(lambda x: make(fcg, name)(x))(x))

    assert "normalize" in traced()
    with fcg.use_autodiff():
        assert "normalize" not in traced()


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape", "message"),
    [
        ("LayerNorm", (6,), {}, (4, 5), r"scale and bias have 6 elements, but .* have 5"),
        ("LayerNorm", (6,), {"reduction_axes": 3}, (4, 6), r"axis 3 does not exist.* has 2 axes"),
        ("BatchNorm", (6,), {"axis": 1}, (6,), r"axis 1 does not exist.* has 1 axes"),
        ("GroupNorm", (6, 3), {}, (4, 9), r"has 9 features; expected 6, 3 groups of 2"),
        ("GroupNorm", (6, 3), {"reduction_axes": 0}, (4, 6), r"lack the last axis .* add -1"),
        ("InstanceNorm", (4,), {"feature_axes": 0}, (4, 6), r"cannot include the leading"),
        ("BatchNorm", (6,), {"use_running_average": None}, (4, 6), r"No `use_running_average`"),
    ],
)
def test_errors_say_what_is_wrong(name, args, kwargs, shape, message):
    layer = make(fcg, name, *args, **kwargs)
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape))


def test_standardize_is_that_of_nnx():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, x.shape).at[:, 0].set(True)
    arguments = (
        {},
        {"axis": (0, 2)},
        {"axis": None},
        {"axis": 1, "where": mask, "epsilon": 0.1},
        {"mean": 0.5},
        {"epsilon": jnp.float32(0.5), "algorithm": "stable"},
    )

    @jax.jit
    def outputs_and_gradients(x):
        def of(module, kwargs):
            y, pull = jax.vjp(lambda x: module.standardize(x, **kwargs), x)
            return y, pull(jnp.cos(y))[0]

        return [[of(m, kwargs) for kwargs in arguments] for m in (fcg, nnx)]

    for ours, theirs in zip(*map(jax.tree.leaves, outputs_and_gradients(x)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.dtype == theirs.dtype
    assert fcg.standardize(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="algorithm='exact': expected 'fast' or 'stable'"):
        fcg.standardize(x, algorithm="exact")
