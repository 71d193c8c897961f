"""Where nnx takes an argument in some form, the drop-in takes it too and computes the same.

Each case is a form, not a shape: an integer of NumPy for an axis, a list for a precision, a name in
lower case, an input that is no array of JAX, a parameter put in by hand. The layer of nnx says what
is right, value and gradient.
"""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(2, 6, 5, 4)).astype(np.float32)
MASK = np.arange(48).reshape(2, 6, 4) % 5 > 0
WEAK = jnp.asarray(np.random.default_rng(2).integers(0, 255, (2, 6, 4)).astype(np.uint8)) / 255.0


def randomized(layer):
    """Parameters that are no zeros or ones, which would hide an error."""
    for i, variable in enumerate(jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=is_variable)):
        value = variable.get_raw_value()
        noise = jax.random.normal(jax.random.key(i), value.shape, jnp.float32)
        variable.set_raw_value((1 + 0.3 * noise).astype(value.dtype))
    return layer


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def made(name, *args, edit=None, call=None, jit=False, x=X, **kwargs):
    """A case: how a layer is made, edited and called."""

    def run(library):
        cls = getattr(library, name)
        takes_rngs = "rngs" in inspect.signature(cls.__init__).parameters
        layer = randomized(cls(*args, **kwargs, **({"rngs": nnx.Rngs(0)} if takes_rngs else {})))
        if edit is not None:
            edit(layer)
        return value_and_gradients(call or (lambda layer, x: layer(x)), jit, layer, x)

    return run


def applied(name, x=X, jit=False, **kwargs):
    """A case: a function of an array, with further arguments."""
    return lambda library: value_and_gradients(
        lambda _, x: getattr(library, name)(x, **kwargs), jit, nnx.Dict(), x
    )


def value_and_gradients(call, jit, layer, x):
    def loss(layer, x):
        y = call(layer, x)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(jnp.real(y).astype(jnp.float32) * weights), y

    floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
    gradient = nnx.value_and_grad(loss, argnums=(0, 1) if floating else 0, has_aux=True)
    (_, y), gradients = (nnx.jit(gradient) if jit else gradient)(layer, x)
    return y, gradients


def put(**shapes):
    """Puts parameters of other shapes into a layer."""

    def edit(layer):
        for i, (name, shape) in enumerate(shapes.items()):
            value = None
            if shape is not None:
                value = nnx.Param(jax.random.normal(jax.random.key(i), shape))
            setattr(layer, name, nnx.data(value))

    return edit


def attributes(**values):
    """Sets attributes of a layer."""

    def edit(layer):
        for name, value in values.items():
            setattr(layer, name, value)

    return edit


NORMS = {"LayerNorm": (4,), "RMSNorm": (4,), "GroupNorm": (4, 2), "InstanceNorm": (4,)}
PRODUCTS = {
    "Linear": (4, 3),
    "LinearGeneral": (4, (3, 2)),
    "Einsum": ("nti,io->nto", (4, 3), (3,)),
    "Conv": (4, 3, 3),
    "ConvTranspose": (4, 3, 3),
    "LoRA": (4, 2, 3),
}
LAYERS = {**PRODUCTS, **NORMS, "BatchNorm": (4,)}
BFLOAT16 = {"dtype": jnp.bfloat16}


def attend(layer, x):
    return layer.attend(x)


def pooled(name, **kwargs):
    return applied(name, IMAGES, window_shape=(3, 2), **kwargs)


def windows(name, **kwargs):
    return made(name, 4, 3, (3, 2), x=IMAGES, **kwargs)


CASES = {
    # Integers and numbers of NumPy and JAX, lists for tuples.
    "LayerNorm, axes of NumPy": made(
        "LayerNorm", 4, reduction_axes=np.int64(-1), feature_axes=np.array([-1])
    ),
    "BatchNorm, axis of NumPy": made("BatchNorm", 4, axis=np.int64(-1)),
    "InstanceNorm, axes in a list": made("InstanceNorm", 4, feature_axes=[-1]),
    "LinearGeneral, axis of NumPy": made("LinearGeneral", 4, 3, axis=np.int64(-1)),
    "glu, axis of NumPy": applied("glu", axis=np.int64(-1)),
    "softmax, axis of NumPy": applied("softmax", axis=np.int64(-1)),
    "logsumexp, axes in an array": applied("logsumexp", axis=np.array([-1])),
    "LayerNorm, epsilon of JAX": made("LayerNorm", 4, epsilon=jnp.float32(1e-3)),
    "LayerNorm, epsilon traced": made("LayerNorm", 4, epsilon=jnp.float32(1e-3), jit=True),
    "BatchNorm, epsilon traced": made("BatchNorm", 4, epsilon=jnp.float32(1e-3), jit=True),
    "BatchNorm, momentum of JAX": made("BatchNorm", 4, momentum=jnp.float32(0.9)),
    "standardize, epsilon of NumPy": applied("standardize", epsilon=np.float32(1e-3)),
    "LayerNorm, mask of NumPy": made("LayerNorm", 4, call=lambda layer, x: layer(x, mask=MASK)),
    "softmax, where of NumPy": applied("softmax", where=MASK),
    "LayerNorm, axis_name in a list": made(
        "LayerNorm",
        4,
        axis_name=["i"],
        call=lambda layer, x: jax.vmap(nnx.clone(layer), axis_name="i")(x),
    ),
    "Conv, strides in an array": windows("Conv", strides=np.array([2, 1])),
    "ConvTranspose, strides of NumPy": windows("ConvTranspose", strides=(np.int64(2), 1)),
    "max_pool, no strides": pooled("max_pool", strides=()),
    "avg_pool, no strides": pooled("avg_pool", strides=()),
    # Names in any case.
    "Conv, padding valid": windows("Conv", padding="valid"),
    "Conv, padding Same": windows("Conv", padding="Same", strides=2),
    "Conv, padding same_lower": windows("Conv", padding="same_lower"),
    "Conv, padding of ints and pairs": windows("Conv", padding=[1, (2, 0)]),
    "ConvTranspose, padding valid": windows("ConvTranspose", padding="valid"),
    "ConvTranspose, padding SAME_LOWER": windows("ConvTranspose", padding="SAME_LOWER"),
    "max_pool, padding same": pooled("max_pool", padding="same"),
    # Dtypes that the hand-written backwards are not for.
    "PReLU, complex": made("PReLU", dtype=jnp.complex64),
    "Embed.attend, complex": made("Embed", 3, 4, dtype=jnp.complex64, call=attend),
    "Embed, integers": made("Embed", 3, 4, dtype=jnp.int32, x=np.array([0, 2])),
    "Linear, 8 bits": made("Linear", 4, 3, dtype=ml_dtypes.float8_e4m3fn),
    "Linear, a name": made("Linear", 4, 3, dtype="bfloat16"),
    # Inputs other than arrays of JAX with a dtype of their own.
    "Embed.attend, weakly typed": made("Embed", 3, 4, **BFLOAT16, x=WEAK, call=attend),
    "Embed.attend, a Param": made("Embed", 3, 4, x=nnx.Param(jnp.asarray(X)), call=attend),
    "Linear, weakly typed, float16 parameters": made("Linear", 4, 3, param_dtype="float16", x=WEAK),
    "LoRALinear, weakly typed": made(
        "LoRALinear", 4, 3, lora_rank=2, **BFLOAT16, lora_dtype=jnp.bfloat16, x=WEAK
    ),
    "LoRALinear, a Param": made("LoRALinear", 4, 3, lora_rank=2, x=nnx.Param(jnp.asarray(X))),
    "LoRA, what its base is given": made(
        "LoRA", 4, 2, 3, **BFLOAT16, base_module=lambda x: jnp.sum(x, -1, keepdims=True)
    ),
    "Embed, ids of 8 bits": made("Embed", 300, 2, x=np.array([0, 100, 99, 127], np.int8)),
    "Embed, unsigned ids": made("Embed", 300, 2, x=np.array([0, 255, 99, 127], np.uint8)),
    # Parameters of other shapes, put in by hand, and attributes that were set.
    "Linear, bias of two axes": made("Linear", 4, 3, edit=put(bias=(1, 3))),
    "Conv, bias of one element": made("Conv", 4, 3, 3, edit=put(bias=(1,))),
    "Conv, bias for each place": made("Conv", 4, 3, 3, edit=put(bias=(6, 3))),
    "ConvTranspose, bias without axes": made("ConvTranspose", 4, 3, 3, edit=put(bias=())),
    "LinearGeneral, bias of two axes": made("LinearGeneral", 4, 3, edit=put(bias=(3, 1))),
    "Linear, other outputs": made("Linear", 4, 3, edit=put(kernel=(4, 2), bias=(2,))),
    "Conv, other outputs": made("Conv", 4, 3, 3, edit=put(kernel=(3, 4, 2), bias=(2,))),
    "Conv, groups, other outputs": made(
        "Conv", 4, 6, 3, feature_group_count=2, edit=put(kernel=(3, 2, 4), bias=(4,))
    ),
    "Conv, other inputs": made("Conv", 5, 3, 3, edit=put(kernel=(3, 4, 3))),
    "Conv, another window": made("Conv", 4, 3, 3, edit=put(kernel=(5, 4, 3))),
    "Conv, another window, circular": made(
        "Conv", 4, 3, 3, padding="CIRCULAR", edit=put(kernel=(5, 4, 3))
    ),
    "ConvTranspose, another window": made(
        "ConvTranspose", 4, 3, 3, strides=2, edit=put(kernel=(5, 4, 3))
    ),
    "Linear, more axes of the kernel": made("Linear", 4, 3, edit=put(kernel=(4, 3, 3))),
    "Conv, use_bias": made("Conv", 4, 3, 3, edit=attributes(use_bias=False)),
    "ConvTranspose, use_bias": made("ConvTranspose", 4, 3, 3, edit=attributes(use_bias=False)),
    "Embed, more rows": made("Embed", 3, 2, x=np.array([0, 8]), edit=put(embedding=(9, 2))),
    "Embed, one row": made("Embed", 3, 2, x=np.array([0, 1]), edit=put(embedding=(1, 2))),
    "Embed, num_embeddings": made(
        "Embed", 1, 2, x=np.array([0, 1]), edit=attributes(num_embeddings=2)
    ),
    "BatchNorm, statistics of two axes": made(
        "BatchNorm",
        4,
        use_running_average=True,
        edit=lambda layer: setattr(layer, "mean", nnx.BatchStat(jnp.ones((1, 4)))),
    ),
}
for name in ("Linear", "LinearGeneral", "Conv"):
    CASES[f"{name}, precision in a list"] = made(
        name, *PRODUCTS[name], precision=["high", "highest"]
    )
for name, args in {**NORMS, "BatchNorm": (4,)}.items():
    if name != "GroupNorm":  # that of nnx reshapes it
        CASES[f"{name}, mask True"] = made(name, *args, call=lambda layer, x: layer(x, mask=True))
    CASES[f"{name}, scale of two axes"] = made(name, *args, edit=put(scale=(1, 4)))
for name, args in LAYERS.items():
    CASES[f"{name}, complex"] = made(name, *args, dtype=jnp.complex64)
    CASES[f"{name}, weakly typed"] = made(name, *args, **BFLOAT16, x=WEAK)
    CASES[f"{name}, a Param"] = made(name, *args, x=nnx.Param(jnp.asarray(X)))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("case", CASES)
def test_a_form_that_nnx_takes_is_taken_and_means_the_same(case):
    run = CASES[case]
    got, expected = run(fcg), run(nnx)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    half = any(a.dtype.itemsize < 4 for a in jax.tree.leaves(expected))
    tolerance = 3e-2 if half else 2e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.complex64 if jnp.iscomplexobj(v) else np.float32) for v in (a, b))
        size = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)
