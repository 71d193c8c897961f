"""Conv and ConvTranspose take the place of nnx's: constructor, results, gradients, errors."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_customgrad as fcg

SETTINGS = settings(max_examples=5, deadline=None, derandomize=True)


def agree(*cases, rtol=1e-12):
    """Value and gradients of layers of ours and of nnx, in float64 and in one program.

    A case is a function that makes the layer from a module, and the shape of its input.
    """
    with jax.enable_x64(True):
        split = [[nnx.split(make(module)) for module in (fcg, nnx)] for make, _ in cases]
        states = [[state for _, state in pair] for pair in split]
        inputs = [jax.random.normal(jax.random.key(0), shape, jnp.float64) for _, shape in cases]

        @jax.jit
        def outcomes(states, inputs):
            def one(graphdef, state, x):
                y, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
                g = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
                return jax.tree.leaves((y, vjp(g)))

            return [
                [one(graphdef, s, x) for (graphdef, _), s in zip(pair, state, strict=True)]
                for pair, state, x in zip(split, states, inputs, strict=True)
            ]

        results = outcomes(states, inputs)
    for ours, theirs in results:
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


def per_axis(draw, rank, values):
    number = draw(st.sampled_from(values))
    return draw(st.sampled_from([number, (number,) * rank]))


@st.composite
def cases(draw, transposed):
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    window = tuple(draw(st.integers(1, 5 if rank < 3 else 2)) for _ in range(rank))
    size = tuple(draw(st.integers(1, 7)) for _ in range(rank))
    pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rank, max_size=rank)
    names = ["SAME", "VALID", "CIRCULAR"]
    if not transposed:
        names += ["REFLECT", *(["CAUSAL"] if rank == 1 else [])]
    kwargs = {
        "strides": per_axis(draw, rank, [1, 2, 3]),
        "kernel_dilation": per_axis(draw, rank, [1, 1, 2]),
        "padding": draw(st.one_of(st.sampled_from(names), st.integers(0, 2), pairs)),
        "use_bias": draw(st.booleans()),
        "param_dtype": jnp.float64,
        "bias_init": nnx.initializers.normal(),
    }
    if transposed:
        kwargs["transpose_kernel"] = draw(st.booleans())
        features = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    else:
        groups = draw(st.sampled_from([1, 1, 2, 4, 20]))
        features = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
        kwargs["feature_group_count"] = groups
        if not isinstance(kwargs["padding"], str):
            kwargs["input_dilation"] = per_axis(draw, rank, [1, 2])
    lead = draw(st.sampled_from([(), (2,), (2, 3)]))
    reach = [
        (k - 1)
        * (
            kwargs["kernel_dilation"]
            if isinstance(kwargs["kernel_dilation"], int)
            else kwargs["kernel_dilation"][0]
        )
        for k in window
    ]
    if kwargs["padding"] == "REFLECT":  # jnp.pad reflects nothing at a single element
        size = tuple(max(n, 2, r) for n, r in zip(size, reach, strict=True))
    return (*features, window), kwargs, (*lead, *size, features[0])


@SETTINGS
@given(cases(transposed=False))
def test_random_convolutions(case):
    args, kwargs, shape = case
    agree((lambda m: m.Conv(*args, **kwargs, rngs=nnx.Rngs(0)), shape))


@SETTINGS
@given(cases(transposed=True))
def test_random_transposed_convolutions(case):
    args, kwargs, shape = case
    agree((lambda m: m.ConvTranspose(*args, **kwargs, rngs=nnx.Rngs(0)), shape))


def test_empty_and_odd_shapes():
    cases = [
        ((0, 5, 2), {"padding": "SAME"}),
        ((2, 1, 2), {"padding": "VALID"}),  # a kernel larger than the image: no output
        ((2, 5, 2), {"padding": "VALID", "strides": 7}),
        ((2, 5, 2), {"padding": [(-1, -2)]}),
    ]
    agree(*((lambda m, k=k: m.Conv(2, 3, 3, **k, rngs=nnx.Rngs(0)), shape) for shape, k in cases))


def test_where_a_period_begins():
    """Windows of odd and even extent, and one that reaches more than once around the image."""

    def make(module, window, transpose_kernel):
        kwargs = {"strides": 2, "padding": "CIRCULAR", "transpose_kernel": transpose_kernel}
        return module.ConvTranspose(2, 3, window, **kwargs, rngs=nnx.Rngs(0))

    cases = itertools.product((2, 5, 8), (False, True))
    agree(*((lambda m, case=case: make(m, *case), (2, 3, 2)) for case in cases))


def test_an_even_window_has_more_on_its_right():
    def case(padding):
        return lambda m: m.Conv(2, 3, 4, padding=padding, rngs=nnx.Rngs(0)), (2, 5, 2)

    agree(case("CIRCULAR"), case("REFLECT"))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_it_is_the_layer_of_nnx(name):
    ours, theirs = getattr(fcg, name), getattr(nnx, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    parameters = [list(inspect.signature(c.__call__).parameters) for c in (ours, theirs)]
    assert parameters[0] == parameters[1]
    layers = [c(2, 4, (3,), rngs=nnx.Rngs(0)) for c in (ours, theirs)]
    assert vars(layers[0]).keys() == vars(layers[1]).keys()
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(layer) for layer in layers))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_dtypes(name):
    """Of the computation, the result and the input: each with each other."""
    cases = [
        (dtype, preferred, x_dtype)
        for dtype in (None, jnp.float32, jnp.bfloat16, jnp.float16)
        for preferred in (None, jnp.float32, jnp.bfloat16)
        for x_dtype in (jnp.float32, jnp.bfloat16)
        # XLA refuses a result that is narrower than the kernel.
        if not (preferred == jnp.bfloat16 and dtype in (None, jnp.float32))
    ]
    layers = [
        [
            getattr(m, name)(
                4, 4, 3, dtype=dtype, preferred_element_type=preferred, rngs=nnx.Rngs(0)
            )
            for m in (fcg, nnx)
        ]
        for dtype, preferred, _ in cases
    ]
    inputs = [jax.random.normal(jax.random.key(0), (2, 6, 4), x_dtype) for *_, x_dtype in cases]

    def gradient(layer, x):
        return nnx.grad(lambda m, x: jnp.sum(m(x).astype(jnp.float32)), argnums=(0, 1))(layer, x)

    @jax.jit
    def outcomes(layers, inputs):
        return [
            # JAX has no gradient of its own for a convolution whose result is wider.
            [(m(x), gradient(m, x) if preferred is None else ()) for m in pair]
            for pair, x, (_, preferred, _) in zip(layers, inputs, cases, strict=True)
        ]

    for case, pair in zip(cases, outcomes(layers, inputs), strict=True):
        half = jnp.bfloat16 in case or jnp.float16 in case
        tolerance = 2e-2 if half else 1e-6
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            assert a.dtype == b.dtype, case
            a, b = (np.asarray(v, np.float32) for v in (a, b))
            atol = tolerance * max(1, np.max(np.abs(b)))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=str(case))


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_the_forward_is_that_of_nnx_in_float32(groups):
    layers = [
        m.Conv(64, 64, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0)) for m in (fcg, nnx)
    ]
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    ours, theirs = (layer(x) for layer in layers)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.max(jnp.abs(theirs))))


@pytest.mark.parametrize("groups", [1, 4, 16], ids=lambda n: f"{n} groups")
def test_half_precision_is_summed_in_float32(groups):
    """1024 windows and cotangents of one sign, where autodiff's sum of a bias is off by 1e-2."""
    layer = fcg.Conv(
        16, 16, (3, 3), feature_group_count=groups, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 16)).astype(jnp.bfloat16)
    grads = nnx.jit(nnx.grad(lambda m, x: jnp.sum(m(x).astype(jnp.float32))))(layer, x)
    wide = nnx.Conv(16, 16, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))
    wide.kernel[...] = wide.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    expected = nnx.jit(nnx.grad(lambda m, x: jnp.sum(m(x))))(wide, x.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT", 2], ids=str)
def test_nothing_is_kept_but_what_the_caller_holds(padding):
    x = jnp.ones((2, 8, 8, 4), jnp.bfloat16)
    layer = fcg.Conv(4, 8, (3, 3), padding=padding, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    kept = fcg.residuals(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    assert all(r.is_argument for r in kept)


@pytest.mark.smoke
def test_a_mask_has_its_say():
    mask = jnp.tril(jnp.ones((3, 2, 4)))
    agree(
        (lambda m: m.Conv(2, 4, 3, mask=mask, rngs=nnx.Rngs(0)), (2, 5, 2)),
        (lambda m: m.ConvTranspose(2, 4, 3, mask=mask, rngs=nnx.Rngs(0)), (2, 5, 2)),
    )
    with pytest.raises(ValueError, match="same shape as weights"):
        fcg.Conv(2, 4, 3, mask=mask[:2], rngs=nnx.Rngs(0))(jnp.ones((5, 2)))


def test_injected_operations_are_used():
    calls = []

    def convolve(*args, **kwargs):
        calls.append("conv_general_dilated")
        return jax.lax.conv_general_dilated(*args, **kwargs)

    def promote(arrays, dtype):
        calls.append("promote_dtype")
        return arrays

    layers = [
        fcg.Conv(2, 3, 3, conv_general_dilated=convolve, rngs=nnx.Rngs(0)),
        fcg.Conv(2, 3, 3, promote_dtype=promote, rngs=nnx.Rngs(0)),
        fcg.ConvTranspose(2, 3, 3, promote_dtype=promote, rngs=nnx.Rngs(0)),
    ]
    for layer in layers:
        nnx.grad(lambda m: m(jnp.ones((4, 2))).sum())(layer)
    assert calls == ["conv_general_dilated", "promote_dtype", "promote_dtype"]


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda r: fcg.Conv(6, 4, 3, feature_group_count=3, rngs=r), (2, 5, 6), "multiples of"),
        (lambda r: fcg.Conv(6, 4, 3, rngs=r), (2, 5, 5), "in_features=6"),
        (lambda r: fcg.Conv(6, 4, (3, 3), rngs=r), (5, 6), "no room for 2 axes"),
        (lambda r: fcg.Conv(6, 4, 3, strides=0, rngs=r), (2, 5, 6), "strides=0; write an int"),
        (lambda r: fcg.Conv(6, 4, (3, 3), strides=(1,), rngs=r), (2, 5, 5, 6), "or 2 of them"),
        (lambda r: fcg.Conv(6, 4, (3, 3), padding="CAUSAL", rngs=r), (2, 5, 5, 6), "for one axis"),
        (lambda r: fcg.Conv(6, 4, 3, padding="TIGHT", rngs=r), (2, 5, 6), "write 'SAME', 'VALID'"),
        (lambda r: fcg.Conv(6, 4, 3, input_dilation=2, rngs=r), (2, 5, 6), "not dilated"),
        (lambda r: fcg.ConvTranspose(6, 4, 3, rngs=r), (2, 5, 5), "in_features=6"),
        (lambda r: fcg.ConvTranspose(6, 4, 3, padding="CAUSAL", rngs=r), (2, 5, 6), "'CIRCULAR',"),
    ],
)
def test_errors_say_what_to_write(make, shape, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))(jnp.ones(shape))


@pytest.mark.parametrize("layer", [fcg.Conv, fcg.ConvTranspose])
def test_patches_are_turned_by_rows(layer, monkeypatch):
    """With the features apart XLA turns them number by number, in three times the time."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jnp.ones((2, 8, 8, 3))
    conv = layer(3, 5, (4, 4), strides=(4, 4), rngs=nnx.Rngs(0))

    def value_and_gradient(x):
        y, pull_back = jax.vjp(conv, x)
        return pull_back(y)

    text = jax.jit(value_and_gradient).lower(x).as_text()
    turned = re.findall(r"stablehlo.transpose [^\n]*\(tensor<([\dx]+)xf32>\)", text)
    assert max(shape.count("x") + 1 for shape in turned) == 5
