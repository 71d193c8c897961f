"""The loss of an output layer: that of its logits, which are never all there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 5, 4))
KERNEL = RNG.normal(size=(4, 6))
BIAS = RNG.normal(size=6)
LABELS = RNG.integers(0, 6, (2, 5))
WEIGHTS = RNG.random((2, 5))


def by_logits(hidden, kernel, labels, bias, weights, reduction, softcap=None, **kwargs):
    """The same from all logits at once."""
    logits = hidden @ kernel + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    smoothing, z_loss = kwargs.get("label_smoothing", 0), kwargs.get("z_loss", 0)
    y = optax.smooth_labels(jax.nn.one_hot(labels, 6), smoothing)
    losses = optax.softmax_cross_entropy(logits, y)
    counts = labels != kwargs.get("ignore_index")
    weights = jnp.where(counts, weights, 0)
    losses = weights * (losses + z_loss * jax.nn.logsumexp(logits, -1) ** 2)
    if reduction == "none":
        return losses
    return losses.sum() / (weights.sum() if reduction == "mean" else 1)


CASES = {
    "alone": {},
    "softcap": {"softcap": 2.0},
    "all terms": {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.2, "ignore_index": 2},
}


@pytest.mark.parametrize(
    ("case", "reduction", "sizes"),
    [
        ("alone", "sum", (4,)),
        ("alone", "none", (4,)),
        ("softcap", "mean", (4,)),
        ("all terms", "mean", (1, 3, 10)),
        ("all terms", "none", (3,)),
    ],
)
def test_value_and_gradients_in_float64(case, reduction, sizes):
    kwargs = {**CASES[case], "reduction": reduction}

    def outcome(f):
        def loss(hidden, kernel, bias, weights):
            return jnp.sum(jnp.sin(f(hidden, kernel, LABELS, bias=bias, weights=weights, **kwargs)))

        gradient = jax.value_and_grad(loss, (0, 1, 2, 3))
        return jax.tree.leaves(jax.jit(gradient)(HIDDEN, KERNEL, BIAS, WEIGHTS))

    with jax.enable_x64(True):
        expected = outcome(by_logits)
        for rows in sizes:
            kwargs["chunk_rows"] = rows
            got = outcome(fcg.linear_cross_entropy)
            del kwargs["chunk_rows"]
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


HEADS = {
    "Linear": lambda m: m.Linear(4, 6, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0)),
    "no bias": lambda m: m.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)),
    "Embed": lambda m: m.Embed(6, 4, rngs=nnx.Rngs(0)),
    "bf16": lambda m: m.Linear(4, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("library", [nnx, fcg], ids=["nnx", "fcg"])
@pytest.mark.parametrize("name", HEADS)
def test_a_layer_as_the_head(name, library):
    head, hidden = HEADS[name](library), jnp.asarray(HIDDEN, jnp.float32)

    def of_logits(head, hidden):
        logits = head.attend(hidden) if name == "Embed" else head(hidden)
        return fcg.softmax_cross_entropy(logits, LABELS).mean()

    @nnx.jit
    def outcomes(head, hidden):
        losses = (lambda head, x: fcg.linear_cross_entropy(x, head, LABELS), of_logits)
        return [nnx.value_and_grad(loss, argnums=(0, 1))(head, hidden) for loss in losses]

    got, expected = outcomes(head, hidden)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    tolerance = 2e-2 if name == "bf16" else 1e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_rows_that_do_not_count():
    """Whatever they hold, they change nothing; where none counts, the loss is 0."""
    hidden = jnp.asarray(HIDDEN, jnp.float32).at[0, 1].set(jnp.nan)
    labels = jnp.asarray(LABELS).at[0, 1].set(-1)

    @jax.jit
    def outcome(hidden, labels):
        def loss(hidden, kernel):
            return fcg.linear_cross_entropy(hidden, kernel, labels, ignore_index=-1, chunk_rows=3)

        return jax.value_and_grad(loss, (0, 1))(hidden, jnp.asarray(KERNEL, jnp.float32))

    value, (dhidden, dkernel) = outcome(hidden, labels)
    assert not dhidden[0, 1].any()
    others = outcome(hidden.at[0, 1].set(7.0), labels)
    for a, b in zip(
        jax.tree.leaves((value, (dhidden, dkernel))), jax.tree.leaves(others), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    value, slopes = outcome(hidden, jnp.full_like(labels, -1))
    assert value == 0
    assert not any(d.any() for d in slopes)
    with pytest.raises(ValueError, match="the label -1 is none of the 6 classes"):
        fcg.linear_cross_entropy(HIDDEN, KERNEL, labels)
    traced = jax.jit(lambda labels: fcg.linear_cross_entropy(hidden, KERNEL, labels))(labels)
    assert np.isfinite(traced)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_in_float32(dtype):
    """Thousands of rows of one sign, in half precision."""
    hidden, kernel = jnp.full((4096, 4), 1.5, dtype), jnp.asarray(KERNEL, dtype)
    labels = jnp.zeros(4096, int)

    def loss(hidden, kernel):
        return fcg.linear_cross_entropy(hidden, kernel, labels, chunk_rows=128)

    value, dkernel = jax.jit(jax.value_and_grad(loss, 1))(hidden, kernel)
    wide = jax.jit(jax.value_and_grad(loss, 1))(*(a.astype(jnp.float32) for a in (hidden, kernel)))
    assert value.dtype == jnp.float32
    assert dkernel.dtype == dtype
    np.testing.assert_allclose(value, wide[0], rtol=1e-5)
    limit = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(dkernel, np.float32), wide[1], rtol=limit, atol=limit * float(abs(wide[1]).max())
    )


ROWS, FEATURES, CLASSES = 520, 8, 1024


def program(f, *argnums):
    hidden, kernel = jnp.ones((ROWS, FEATURES)), jnp.ones((FEATURES, CLASSES))
    derivative = jax.value_and_grad(f, argnums) if argnums else f
    return jax.jit(derivative).lower(hidden, kernel).compile()


def of_output_layer(hidden, kernel, **kwargs):
    labels = jnp.zeros(ROWS, int)
    losses = fcg.linear_cross_entropy(hidden, kernel, labels, chunk_rows=65, **kwargs)
    return losses.mean()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_array_of_all_logits(reduction):
    def loss(hidden, kernel):
        return of_output_layer(hidden, kernel, reduction=reduction)

    for argnums in ((), (0, 1)):
        compiled = program(loss, *argnums)
        assert f"f32[{ROWS},{CLASSES}]" not in compiled.as_text()
        assert f"f32[65,{CLASSES}]" in compiled.as_text()
        # A chunk of logits takes 270 kB, all of them 2.1 MB.
        assert compiled.memory_analysis().temp_size_in_bytes < 1.2e6


def products(f, *argnums):
    return program(f, *argnums).as_text().count(" dot(")


def test_devices_add_the_gradient_of_the_kernel_once():
    def loss(kernel, hidden, labels):
        return fcg.linear_cross_entropy(hidden, kernel, labels, reduction="sum", chunk_rows=2)

    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(4, 6)), rng.normal(size=(64, 4)), rng.integers(0, 6, 64)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = step(*arrays)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = P(None, "model"), P("data"), P("data")
        arrays = jax.device_put(arrays, tuple(NamedSharding(mesh, spec) for spec in specs))
        program = step.lower(*arrays).compile()
        got = program(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # The kernel of a device, 4 x 3, is not exchanged in the loop over its 8 chunks.
    added = re.findall(r"f32\[4,3\].* all-reduce\(.*", program.as_text())
    assert len(added) == 1
    assert "while" not in added[0]


def test_nothing_is_computed_that_is_not_asked_for():
    assert products(of_output_layer) == 1
    assert products(of_output_layer, 0) == 2  # as for a kernel that is frozen
    assert products(of_output_layer, 0, 1) == 3


def test_a_batch_with_one_kernel_has_no_kernel_gradient_per_example():
    hidden, kernel = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    labels = jnp.asarray(LABELS)

    def loss(kernel):
        return jax.vmap(lambda x, l: fcg.linear_cross_entropy(x, kernel, l))(hidden, labels).sum()

    lowered = jax.jit(jax.grad(loss)).lower(kernel)
    assert "tensor<2x4x6xf32>" not in lowered.as_text()
    expected = jax.grad(
        lambda k: sum(fcg.linear_cross_entropy(hidden[i], k, labels[i]) for i in range(2))
    )(kernel)
    np.testing.assert_allclose(lowered.compile()(kernel), expected, rtol=1e-5, atol=1e-6)


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def doubled(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


RNGS = nnx.Rngs(0)
REFUSED = {
    "a layer of another kind": (Doubled(4, 6, rngs=RNGS), {}, TypeError, "a Doubled that computes"),
    "LoRALinear": (nnx.LoRALinear(4, 6, lora_rank=1, rngs=RNGS), {}, TypeError, "of its own"),
    "a product": (nnx.Linear(4, 6, dot_general=doubled, rngs=RNGS), {}, TypeError, "of its own"),
    "bias of a layer": (
        nnx.Linear(4, 6, rngs=RNGS),
        {"bias": BIAS},
        TypeError,
        "are those of the head",
    ),
    "other features": (KERNEL.T, {}, ValueError, r"expected \(..., 6\)"),
    "bias": (KERNEL, {"bias": BIAS[:5]}, ValueError, r"the bias has shape \(5,\)"),
    "word": (KERNEL, {"reduction": "average"}, ValueError, "reduction='average' is none of"),
    "rows": (KERNEL, {"chunk_rows": 0}, ValueError, "chunk_rows=0"),
    "softcap": (KERNEL, {"softcap": 0.0}, ValueError, "softcap=0.0 must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    head, kwargs, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fcg.linear_cross_entropy(HIDDEN, head, LABELS, **kwargs)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_odd_shapes(shape, reduction):
    x, labels = jnp.zeros(shape), jnp.zeros(shape[:-1], int)
    losses, pull = jax.vjp(
        lambda x: fcg.linear_cross_entropy(x, KERNEL, labels, reduction=reduction), x
    )
    assert losses.shape == (() if reduction == "mean" else shape[:-1])
    np.testing.assert_allclose(losses, np.log(6) if x.size else 0, rtol=1e-6)
    assert pull(jnp.ones_like(losses))[0].shape == shape
