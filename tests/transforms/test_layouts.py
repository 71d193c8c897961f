"""Whole models over eight devices: the gradients of one device, and no more exchanged than by nnx.

data      the batch is split
tensor    and so are the features between two products, as in arXiv:1909.08053
sharded   the batch is split, and so is every parameter but those of a BatchNorm: of these XLA
          would gather more than for nnx
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg

CLASSES, FEATURES, HEADS, LENGTH, BATCH = 64, 32, 4, 8, 16
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


class SwiGLU(nnx.Module):
    def __init__(self, size, out, *, rngs):
        self.gate = nnx.Linear(size, out, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(size, out, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return nnx.silu(self.gate(x)) * self.up(x)


class Decoder(nnx.Module):
    def __init__(self, library, *, rngs):
        gated = fcg.SwiGLU if library is fcg else SwiGLU
        self.embed = library.Embed(CLASSES, FEATURES, rngs=rngs)
        self.before = library.RMSNorm(FEATURES, rngs=rngs)
        self.attention = library.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.between = library.LayerNorm(FEATURES, rngs=rngs)
        self.gated = gated(FEATURES, 2 * FEATURES, rngs=rngs)
        self.down = library.Linear(2 * FEATURES, FEATURES, rngs=rngs)
        self.after = library.RMSNorm(FEATURES, rngs=rngs)

    def loss(self, tokens, labels, **where):
        x = self.embed(tokens, **where)
        x = x + self.attention(self.before(x), is_causal=True, **where)
        x = self.after(x + self.down(self.gated(self.between(x)), **where))
        if isinstance(self.embed, fcg.Embed):
            return fcg.linear_cross_entropy(x, self.embed, labels, reduction="sum")
        return cross_entropy(self.embed.attend(x), labels)


class ResNet(nnx.Module):
    def __init__(self, library, *, rngs):
        def conv(size, out, window=(3, 3), strides=1):
            return library.Conv(size, out, window, strides, use_bias=False, rngs=rngs)

        self.stem, self.norm = conv(3, 16), library.BatchNorm(16, rngs=rngs)
        self.up, self.norm_up = conv(16, 32, strides=2), library.BatchNorm(32, rngs=rngs)
        self.down, self.norm_down = conv(32, 24), library.BatchNorm(24, rngs=rngs)
        self.shortcut = conv(16, 24, (1, 1), 2)
        self.head = library.Linear(24, CLASSES, rngs=rngs)

    def loss(self, images, labels, **where):
        relu = fcg.relu if isinstance(self.head, fcg.Linear) else nnx.relu
        x = relu(self.norm(self.stem(images)))
        # Explicit axes ask how the features are split; down adds up what is split.
        of_up = {"out_sharding": P("data", None, None, "model")} if where else {}
        y = relu(self.norm_up(self.up(x, **of_up)))
        y = self.norm_down(self.down(y, **where))
        x = relu(y + self.shortcut(x))
        return cross_entropy(self.head(x.mean((1, 2))), labels)


def cross_entropy(logits, labels):
    return -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1]))


RNG = np.random.default_rng(0)
BATCHES = {
    Decoder: tuple(RNG.integers(0, CLASSES, (2, BATCH, LENGTH))),
    ResNet: (RNG.normal(size=(BATCH, 8, 8, 3)).astype("f"), RNG.integers(0, CLASSES, BATCH)),
}

# The first pattern that a path matches says how its parameter is split.
TENSOR = {
    "embed/": P("model", None),
    "(query|key|value)/kernel": P(None, "model", None),
    "(query|key|value)/bias": P("model", None),
    "attention/out/kernel": P("model", None, None),
    "gated/.*/kernel": P(None, "model"),
    "down/kernel": P("model", None),
}
TENSOR_CONV = {
    "up/kernel": P(None, None, None, "model"),
    "norm_up/": P("model"),
    "down/kernel": P(None, None, "model", None),
}


def spec_of(path, array, layout):
    """How a parameter is split in a layout."""
    name = "/".join(map(str, path))
    if layout == "data" or (layout == "sharded" and "norm" in name):
        return P()
    if layout == "sharded":
        # The longest axis that can be.
        axis = max((n, i) for i, n in enumerate(array.shape) if n % 8 == 0)[1]
        return P(*("data" if i == axis else None for i in range(array.ndim)))
    patterns = TENSOR_CONV if array.ndim == 4 or "norm_" in name else TENSOR
    return next((spec for pattern, spec in patterns.items() if re.match(pattern, name)), P())


def step(model, layout=None, axis_type=AUTO):
    """Loss, running statistics and gradients as a function, and its first two arguments."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    where = {"out_sharding": P("data")} if axis_type == EXPLICIT else {}

    def loss(params, rest, batch):
        if axis_type == EXPLICIT and layout == "sharded":
            params = jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params)
        # New Variables, which this trace may write.
        model = nnx.merge(graphdef, params, jax.tree.map(lambda a: a, rest))
        return model.loss(*batch, **where), nnx.state(model, nnx.BatchStat)

    return jax.value_and_grad(loss, has_aux=True), params, rest


def on_mesh(model, layout, axis_type):
    """The compiled step in a layout, and its arguments."""
    sizes = (2, 4) if layout == "tensor" else (8, 1)
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        run, params, rest = step(model, layout, axis_type)
        for path, variable in nnx.to_flat_state(nnx.merge_state(params, rest)):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                spec = spec_of(path, variable, layout)
                variable.set_value(jax.device_put(variable[...], NamedSharding(mesh, spec)))
        batch = BATCHES[type(model)]
        args = params, rest, jax.device_put(batch, NamedSharding(mesh, P("data")))
        # Gradients lie like their parameters, where an optimizer needs them.
        stats = nnx.filter_state(rest, nnx.BatchStat)
        like = jax.tree.map(lambda a: a.sharding, (stats, params))
        out = ((NamedSharding(mesh, P()), like[0]), like[1])
        where = {"out_shardings": out} if axis_type == AUTO else {}
        return jax.jit(run, **where).lower(*args).compile(), args


_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program):
    """How many collectives a program has, and how many bytes they yield."""
    found = _COLLECTIVE.findall(program.as_text())
    # What is exchanged is float32 here.
    shapes = (shape for types in found for shape in re.findall(r"f32\[([\d,]*)\]", types))
    return len(found), sum(4 * math.prod(map(int, filter(None, s.split(",")))) for s in shapes)


@functools.cache
def of_one_device(kind):
    """What the step yields on one device with the layers of nnx."""
    run, *args = step(kind(nnx, rngs=nnx.Rngs(0)))
    return jax.jit(run)(*args, BATCHES[kind])


# Those that tell most; the others hold as well.
CASES = [
    (Decoder, "tensor", EXPLICIT),
    (Decoder, "tensor", AUTO),
    (Decoder, "sharded", AUTO),
    (ResNet, "data", AUTO),
    (ResNet, "tensor", EXPLICIT),
    (ResNet, "sharded", EXPLICIT),
]


@pytest.mark.parametrize(
    ("kind", "layout", "axis_type"),
    CASES,
    ids=[f"{kind.__name__}, {layout}, {axis_type}" for kind, layout, axis_type in CASES],
)
def test_gradients_are_those_of_one_device_and_as_much_is_exchanged_as_by_nnx(
    kind, layout, axis_type
):
    theirs, _ = on_mesh(kind(nnx, rngs=nnx.Rngs(0)), layout, axis_type)
    model = kind(fcg, rngs=nnx.Rngs(0))
    with fcg.use_lowering("xla"):  # those for a CPU alone move more: `choose_lowering`
        program, args = on_mesh(model, layout, axis_type)
    for a, b in zip(*map(jax.tree.leaves, (program(*args), of_one_device(kind))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)
    # A BatchNorm exchanges the mean before the squares about it.
    norms = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, nnx.BatchNorm)]
    (number, size), (their_number, their_size) = map(collectives, (program, theirs))
    assert number <= their_number + len(norms)
    assert size <= their_size + sum(4 * norm.num_features for norm in norms)


@pytest.mark.parametrize("window", [(3, 3), (5, 5)])
def test_a_depthwise_convolution_gathers_no_features(window):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AUTO,))
    found = []
    for m in (nnx, fcg):
        conv = m.Conv(16, 16, window, feature_group_count=16, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(conv)

        def loss(params, x, graphdef=graphdef):
            return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

        params = jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), "model"))),
            params,
        )
        x = jax.device_put(
            jnp.ones((2, 6, 6, 16)), NamedSharding(mesh, P(None, None, None, "model"))
        )
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
        found.append(collectives(program)[0])
    theirs, ours = found
    assert ours <= theirs
