"""The linear family takes the place of nnx's: constructor, parameters, results, injections."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flax_customgrad as fcg
from flax_customgrad import catalogue

DROP_INS = [e for e in catalogue.entries() if e.family == "linear"]


def by_name(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def examples():
    return [
        pytest.param(entry, make, id=f"{entry.name}, {name}")
        for entry in DROP_INS
        for name, make in entry.examples.items()
    ]


def call(made):
    fn, *args = made
    return fn(*args)


def gradients(layer, x):
    return jax.tree.leaves(nnx.grad(lambda m: jnp.sum(m(x).astype(jnp.float32)))(layer))


def outcomes(pairs):
    """Output and gradients of many pairs of layers, ours and nnx's, each on its x; one program."""
    split = [[nnx.split(layer) for layer in layers] for *layers, _ in pairs]
    states = [[state for _, state in pair] for pair in split]

    @jax.jit
    def run(states, inputs):
        def one(graphdef, state, x):
            y, pull = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
            return y, jax.tree.leaves(pull(jnp.ones_like(y)))

        return [
            [one(graphdef, s, x) for (graphdef, _), s in zip(pair, state, strict=True)]
            for pair, state, x in zip(split, states, inputs, strict=True)
        ]

    return run(states, [x for *_, x in pairs])


def parameters_of(function):
    """Names, kinds and defaults of the parameters of a function."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.smoke
@by_name(DROP_INS)
def test_it_is_the_layer_of_nnx(entry):
    assert issubclass(entry.module, entry.reference)
    assert parameters_of(entry.module.__init__) == parameters_of(entry.reference.__init__)
    ours, theirs = (parameters_of(c.__call__) for c in (entry.module, entry.reference))
    assert [name for name, *_ in ours] == [name for name, *_ in theirs]


@pytest.mark.parametrize(("entry", "make"), examples())
def test_state_and_metadata_are_those_of_nnx(entry, make):
    layers = [
        next(a for a in make(cls) if isinstance(a, nnx.Module))
        for cls in (entry.module, entry.reference)
    ]
    ours, theirs = (nnx.state(layer) for layer in layers)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert vars(layers[0]).keys() == vars(layers[1]).keys()


@pytest.mark.parametrize(("entry", "make"), examples())
def test_the_forward_is_bit_identical_in_float32(entry, make):
    for wrap in (lambda f: f, nnx.jit):
        ours, theirs = (wrap(lambda *made: call(made)) for _ in range(2))
        made = [make(cls) for cls in (entry.module, entry.reference)]
        if callable(made[0][0]) and not isinstance(made[0][0], nnx.Module):
            continue  # a method of a layer; test_embed
        np.testing.assert_array_equal(ours(*made[0]), theirs(*made[1]))


@pytest.mark.parametrize("cls", ["Linear", "LinearGeneral", "Einsum"])
def test_dtypes(cls):
    """Of the computation, the parameters, the result and the input: each with each other."""
    args = {"Linear": (3, 4), "LinearGeneral": (3, 4), "Einsum": ("ab,bc->ac", (3, 4), 4)}[cls]
    cases = list(
        itertools.product(
            [None, jnp.float32, jnp.bfloat16, jnp.float16],
            [jnp.float32, jnp.bfloat16],
            [None, jnp.float32, jnp.bfloat16],
            [jnp.float32, jnp.bfloat16],
        )
    )
    pairs = []
    for dtype, param_dtype, preferred, x_dtype in cases:
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "preferred_element_type": preferred}
        layers = (getattr(m, cls)(*args, **kwargs, rngs=nnx.Rngs(0)) for m in (fcg, nnx))
        pairs.append((*layers, jax.random.normal(jax.random.key(0), (8, 3), x_dtype)))
    for case, ((y, grads), (expected, slopes)) in zip(cases, outcomes(pairs), strict=True):
        assert y.dtype == expected.dtype, case
        np.testing.assert_array_equal(y, expected, str(case))
        for a, b in zip(grads, slopes, strict=True):
            assert a.dtype == b.dtype, case
            a, b = (np.asarray(v, np.float32) for v in (a, b))
            np.testing.assert_allclose(a, b, rtol=3e-2, atol=1e-2, err_msg=str(case))


@pytest.mark.parametrize("precision", [jax.lax.Precision.HIGHEST, "high", ("highest", "default")])
def test_precision_reaches_every_product(precision):
    layer = fcg.Linear(3, 4, precision=precision, rngs=nnx.Rngs(0))
    text = str(jax.make_jaxpr(lambda x: jax.vjp(layer, x)[1](layer(x)))(jnp.ones((2, 3))))
    assert text.count("precision=None") == 0
    np.testing.assert_array_equal(
        layer(jnp.ones((2, 3))),
        nnx.Linear(3, 4, precision=precision, rngs=nnx.Rngs(0))(jnp.ones((2, 3))),
    )


def doubled(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


def halved(arrays, *, dtype=None, inexact=True):
    return tuple(None if a is None else a / 2 for a in arrays)


@pytest.mark.parametrize(
    ("cls", "args", "kwargs"),
    [
        ("Linear", (3, 4), {"dot_general": doubled}),
        ("Linear", (3, 4), {"promote_dtype": halved}),
        ("LinearGeneral", (3, 4), {"dot_general": doubled}),
        ("LinearGeneral", (3, 4), {"dot_general_cls": lambda: doubled}),
        ("LinearGeneral", (3, 4), {"promote_dtype": halved}),
        ("Einsum", ("ab,bc->ac", (3, 4)), {"einsum_op": lambda *a, **k: 2 * jnp.einsum(*a, **k)}),
        ("Einsum", ("ab,bc->ac", (3, 4)), {"promote_dtype": halved}),
        ("LoRA", (3, 2, 4), {"promote_dtype": halved}),
        ("LoRALinear", (3, 4), {"lora_rank": 2, "dot_general": doubled}),
    ],
)
def test_an_injected_operation_is_honoured(cls, args, kwargs):
    x = jax.random.normal(jax.random.key(0), (8, 3))
    ours, theirs = (getattr(m, cls)(*args, **kwargs, rngs=nnx.Rngs(0)) for m in (fcg, nnx))
    np.testing.assert_array_equal(ours(x), theirs(x))
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cls", ["Linear", "LinearGeneral", "LoRA", "LoRALinear"])
def test_odd_shapes(cls):
    args = (3, 2, 4) if cls == "LoRA" else (3, 4)
    kwargs = {"lora_rank": 2} if cls == "LoRALinear" else {}
    pairs = []
    for shape in ((3,), (0, 3), (2, 0, 3), (1, 1, 1, 3)):
        layers = (getattr(m, cls)(*args, **kwargs, rngs=nnx.Rngs(0)) for m in (fcg, nnx))
        pairs.append((*layers, jax.random.normal(jax.random.key(0), shape)))
    for (y, grads), (expected, slopes) in outcomes(pairs):
        np.testing.assert_array_equal(y, expected)
        for a, b in zip(grads, slopes, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_lora_around_a_base_module():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    init = {"b_initializer": nnx.initializers.normal(1.0)}
    pairs = []
    for m in (fcg, nnx):
        base = m.Linear(3, 4, rngs=nnx.Rngs(1))
        pairs.append(m.LoRA(3, 2, 4, base_module=base, **init, rngs=nnx.Rngs(0)))
    ((y, grads), (expected, slopes)) = outcomes([(*pairs, x)])[0]
    np.testing.assert_array_equal(y, expected)
    for a, b in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    layer = fcg.LoRA(3, 2, 4, base_module=nnx.Module(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be callable"):
        layer(x)


@pytest.mark.parametrize("features", [(0, 4), (3, 0)], ids=str)
def test_no_features(features):
    layers = [
        m.Linear(*features, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones) for m in (fcg, nnx)
    ]
    x = jnp.ones((2, features[0]))
    np.testing.assert_array_equal(layers[0](x), layers[1](x))
    for a, b in zip(*(gradients(layer, x) for layer in layers), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((2, 3), np.float32),
        [[1.0, 2.0, 3.0]],
        jnp.ones((2, 3), jnp.int32),
        jnp.ones((2, 3), jnp.complex64),
        jnp.ones((2, 3), bool),
    ],
    ids=["numpy", "list", "int", "complex", "bool"],
)
def test_other_inputs(x):
    layers = [m.Linear(3, 4, rngs=nnx.Rngs(0)) for m in (fcg, nnx)]
    np.testing.assert_array_equal(layers[0](x), layers[1](x))

    def gradient(layer):
        return nnx.grad(lambda m: jnp.sum(jnp.abs(m(x))))(layer).kernel[...]

    np.testing.assert_allclose(gradient(layers[0]), gradient(layers[1]), rtol=1e-6)


@pytest.mark.smoke
def test_errors_are_those_of_nnx():
    for module in (fcg, nnx):
        with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
            module.Linear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))
        with pytest.raises(ValueError, match="must be explicit"):
            module.Einsum("ab,bc", (3, 4), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="must be an integer"):
            module.Embed(3, 4, rngs=nnx.Rngs(0))(jnp.ones(2))


def test_metadata_and_sharding_of_parameters_stay():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layer = fcg.Linear(
            4,
            8,
            rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": (None, "model")},
            bias_metadata={"out_sharding": ("model",)},
        )
        x = jnp.ones((8, 4))
        y = layer(x, out_sharding=PartitionSpec(None, "model"))
        assert jax.typeof(y).sharding.spec == PartitionSpec(None, "model")
        grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(layer)
        assert jax.typeof(grads.kernel[...]).sharding.spec == PartitionSpec(None, "model")


def test_forward_mode():
    layer, x = fcg.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones(3)
    np.testing.assert_allclose(jax.jacfwd(layer)(x), layer.kernel[...].T, rtol=1e-6)
