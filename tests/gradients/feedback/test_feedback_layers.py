"""FeedbackLinear and FeedbackConv: those of nnx, but for the gradient of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg

CASES = {
    "linear": (fcg.FeedbackLinear, nnx.Linear, (5, 4), {}, (3, 5)),
    "linear, no batch": (fcg.FeedbackLinear, nnx.Linear, (5, 4), {}, (5,)),
    "linear, no bias": (fcg.FeedbackLinear, nnx.Linear, (5, 4), {"use_bias": False}, (2, 3, 5)),
    "conv, same": (fcg.FeedbackConv, nnx.Conv, (3, 4, (3, 3)), {}, (2, 5, 4, 3)),
    "conv, valid, strides": (
        fcg.FeedbackConv,
        nnx.Conv,
        (3, 4, 3, 2),
        {"padding": "VALID"},
        (9, 3),
    ),
    "conv, circular, dilated": (
        fcg.FeedbackConv,
        nnx.Conv,
        (3, 4, (3, 2)),
        {"padding": "CIRCULAR", "kernel_dilation": (1, 2)},
        (2, 4, 5, 3),
    ),
    "conv, reflected, grouped": (
        fcg.FeedbackConv,
        nnx.Conv,
        (4, 6, 3),
        {"padding": "REFLECT", "feature_group_count": 2},
        (2, 1, 5, 4),
    ),
    "conv, depthwise, causal": (
        fcg.FeedbackConv,
        nnx.Conv,
        (4, 4, 3),
        {"padding": "CAUSAL", "feature_group_count": 4},
        (2, 6, 4),
    ),
    "conv, spread input, explicit padding": (
        fcg.FeedbackConv,
        nnx.Conv,
        (2, 3, 2),
        {"padding": ((2, 0),), "input_dilation": 2},
        (2, 4, 2),
    ),
    "conv, patches": (fcg.FeedbackConv, nnx.Conv, (2, 3, (2, 2), 2), {}, (2, 4, 6, 2)),
    "conv, mask": (
        fcg.FeedbackConv,
        nnx.Conv,
        (2, 3, 3),
        {"mask": jnp.tile(jnp.array([1.0, 1.0, 0.0])[:, None, None], (1, 2, 3))},
        (2, 5, 2),
    ),
}


def gradients(call, layer, x, g):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    y, pull = jax.vjp(lambda params, x: call(nnx.merge(graphdef, params, rest), x), params, x)
    dparams, dx = pull(g)
    return y, nnx.to_pure_dict(dparams), dx


@nnx.jit
def beside_nnx(layer, plain, x):
    """Value and gradients of a layer, of that of nnx, and of it with the feedback for a kernel."""
    g = jnp.sin(plain(x) + 1)
    found, expected = (gradients(type(m).__call__, m, x, g) for m in (layer, plain))
    plain.kernel[...] = layer.feedback[...]
    return found, expected, gradients(type(plain).__call__, plain, x, g)


@pytest.mark.parametrize("case", CASES)
def test_all_but_the_gradient_of_the_input_is_that_of_nnx(case):
    ours, theirs, args, kwargs, shape = CASES[case]
    with jax.enable_x64(True):
        kwargs = {**kwargs, "param_dtype": jnp.float64}
        layers = [cls(*args, **kwargs, rngs=nnx.Rngs(0)) for cls in (ours, theirs)]
        x = np.random.default_rng(1).standard_normal(shape)
        found, expected, of_feedback = beside_nnx(*layers, x)
        (y, dparams, dx), (expected_y, expected_dparams, true_dx) = found, expected
        np.testing.assert_allclose(y, expected_y, rtol=1e-12, atol=1e-12)
        assert dparams.keys() == expected_dparams.keys()
        for name, e in expected_dparams.items():
            np.testing.assert_allclose(dparams[name], e, rtol=1e-12, atol=1e-12)
        # Its input sees the layer of nnx whose kernel is the feedback.
        np.testing.assert_allclose(dx, of_feedback[2], rtol=1e-12, atol=1e-12)
        assert np.abs(dx - true_dx).max() > 0.01


LAYERS = {
    "FeedbackLinear": (lambda **kw: fcg.FeedbackLinear(6, 4, **kw), nnx.Linear, (8, 6)),
    "FeedbackConv": (lambda **kw: fcg.FeedbackConv(6, 4, 3, **kw), nnx.Conv, (2, 5, 6)),
}


@pytest.fixture(params=LAYERS)
def made(request):
    return LAYERS[request.param]


@pytest.mark.smoke
def test_it_is_a_layer_of_nnx_with_feedback_beside(made):
    make, theirs, shape = made
    layer = make(rngs=nnx.Rngs(0))
    assert isinstance(layer, theirs)
    assert layer.feedback.shape == layer.kernel.shape
    assert type(layer.feedback) is fcg.Feedback
    assert not isinstance(layer.feedback, nnx.Param)
    plain = theirs(
        6, 4, *shape[3:], **({} if theirs is nnx.Linear else {"kernel_size": 3}), rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])
    assert not np.array_equal(layer.kernel[...], layer.feedback[...])
    constant = nnx.initializers.constant(0.5)
    layer = make(feedback_init=constant, feedback_metadata={"tag": 1}, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.feedback[...], 0.5)
    assert layer.feedback.tag == 1
    # `convert` leaves what is not of nnx alone, and so does `revert`, which says so.
    with pytest.warns(UserWarning, match=f"and stay: layers/0: .*{type(layer).__name__}"):
        reverted = fcg.revert(fcg.convert(nnx.Sequential(layer)))
    assert type(reverted.layers[0]) is type(layer)


def test_an_optimizer_leaves_the_feedback_alone(made):
    make, _, shape = made
    layer = make(rngs=nnx.Rngs(0))
    before = np.array(layer.feedback[...]), np.array(layer.kernel[...])
    optimizer = nnx.Optimizer(layer, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones(shape)) ** 2))(layer)
        optimizer.update(layer, grads)
        return grads

    assert not nnx.state(step(layer, optimizer), fcg.Feedback)
    np.testing.assert_array_equal(layer.feedback[...], before[0])
    assert not np.array_equal(layer.kernel[...], before[1])


@pytest.mark.parametrize("feedback_dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_half_precision(made, param_dtype, feedback_dtype):
    """Sums are those of Linear and Conv, whatever the dtype of the feedback."""
    make, _, shape = made
    layer = make(dtype=jnp.bfloat16, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    layer.feedback = fcg.Feedback(layer.feedback[...].astype(feedback_dtype))
    x = np.random.default_rng(1).standard_normal(shape).astype(jnp.bfloat16)
    parent = type(layer).__mro__[1]

    @nnx.jit
    def beside_the_parent(layer, x):
        g = jnp.ones_like(layer(x))
        return [gradients(c.__call__, layer, x, g) for c in (type(layer), parent)]

    (y, dparams, dx), (expected_y, expected, _) = beside_the_parent(layer, x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dparams["kernel"].dtype == dparams["bias"].dtype == param_dtype
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (y, expected_y)))
    for name in expected:
        a, b = (np.asarray(d[name], np.float32) for d in (dparams, expected))
        np.testing.assert_array_equal(a, b)


def test_it_keeps_what_the_caller_holds(made):
    make, _, shape = made
    graphdef, state = nnx.split(make(rngs=nnx.Rngs(0)))
    kept = fcg.residuals(lambda state, x: nnx.merge(graphdef, state)(x), state, jnp.ones(shape))
    assert [r for r in kept if not r.is_argument] == []


def test_the_backward_stays_inside_use_autodiff(made):
    make, _, shape = made
    layer, x = make(rngs=nnx.Rngs(0)), jnp.ones(shape)

    @jax.jit
    def both(x):
        gradient = jax.grad(lambda x: jnp.sum(layer(x)))
        with fcg.use_autodiff():
            inside = gradient(x)
        return inside, gradient(x)

    inside, outside = both(x)
    np.testing.assert_allclose(inside, outside, rtol=1e-5)


def test_bad_arguments(made):
    make, theirs, shape = made
    x = jnp.ones(shape)
    name = "dot_general" if theirs is nnx.Linear else "conv_general_dilated"
    for own in ({name: lambda *args, **kwargs: x}, {"promote_dtype": lambda *args, **kwargs: args}):
        with pytest.raises(
            ValueError, match=r"Feedback\w+: an operation of your own has no feedback"
        ):
            make(**own, rngs=nnx.Rngs(0))(x)
    layer = make(rngs=nnx.Rngs(0))
    for bad in (x.astype(jnp.int32), x * 1j, [1.0]):
        with pytest.raises(TypeError, match=r"Feedback\w+: inputs of .* have no gradient"):
            layer(bad)


@pytest.mark.parametrize("name", ["FeedbackLinear", "FeedbackConv"])
def test_what_does_not_belong_together_is_said(name):
    x, args = jnp.ones((2, 4)), (4, 3, 1)[: 3 if "Conv" in name else 2]

    def layer(**kwargs):
        return getattr(fcg, name)(*args, **kwargs, rngs=nnx.Rngs(0))

    with pytest.raises(TypeError, match=r"dtype=.*complex64.* is not a real float of 16 bits"):
        layer(dtype=jnp.complex64)(x)
    for parameter in ("bias", "feedback"):
        edited = layer()
        setattr(edited, parameter, nnx.Param(jnp.ones((1, 3))))
        with pytest.raises(ValueError, match=rf"'{parameter}': \(1, 3\).* replace them together"):
            edited(x)


@pytest.mark.parametrize(
    ("groups", "window", "stride"), [(1, 3, 1), (4, 3, 1), (2, 3, 1), (1, 2, 2)]
)
def test_forward_over_reverse_with_every_lowering(groups, window, stride):
    """Forward mode of a surrogate is the transpose of its backward, so JAX must be able to."""
    layer = fcg.FeedbackConv(4, 4, window, stride, feature_group_count=groups, rngs=nnx.Rngs(0))
    x, v = (jax.random.normal(jax.random.key(i), (2, 6, 4)) for i in range(2))

    def along(x, v):
        return jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))), (x,), (v,))[1]

    with fcg.use_lowering("xla"):
        expected = jax.jit(along)(x, v)
    np.testing.assert_allclose(jax.jit(along)(x, v), expected, rtol=1e-4, atol=1e-5)
