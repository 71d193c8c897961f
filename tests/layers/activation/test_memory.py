"""What the backwards keep: by name in the trace, and in bytes of eight compiled layers."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract.residual_storage import inspecting_residuals

LAYERS = 8


def temporaries(f, *args):
    """Memory of the gradient of eight layers in a scan, in sizes of the first argument."""

    def loss(x, *rest):
        y, _ = jax.lax.scan(lambda c, _: (f(c, *rest).astype(c.dtype), None), x, None, LAYERS)
        return jnp.sum((y * y).astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))
    return gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes / args[0].nbytes


def kept(f, *args):
    """The dtypes and shapes that a backward keeps beside its arguments."""
    with inspecting_residuals():
        return [(str(r.dtype), r.shape) for r in fcg.residuals(f, *args) if not r.is_argument]


exact = functools.partial(fcg.gelu, approximate=False)
bits = functools.partial(fcg.relu, residual="bits")
output = functools.partial(fcg.relu, residual="output")

KEEPS_X = [fcg.gelu, exact, fcg.silu, fcg.mish, fcg.softplus, fcg.log_sigmoid, fcg.squareplus]
KEEPS_X += [fcg.soft_sign, fcg.elu, fcg.selu, fcg.celu, fcg.hard_silu]
KEEPS_Y = [fcg.tanh, fcg.sigmoid, fcg.softmax, fcg.log_softmax]
KEEPS_A_MASK = [fcg.relu, fcg.relu6, fcg.hard_tanh, fcg.hard_sigmoid, fcg.leaky_relu]


def name(f):
    if isinstance(f, functools.partial):
        return f"{f.func.__name__}, {f.keywords}"
    return f.__name__


@pytest.mark.parametrize("f", KEEPS_X, ids=name)
def test_x_is_all_that_is_kept(f):
    assert kept(f, jnp.ones((4, 16))) == []
    assert kept(f, jnp.ones((4, 16), jnp.bfloat16)) == []


@pytest.mark.parametrize("f", [fcg.tanh, fcg.sigmoid])
def test_y_is_kept_or_in_half_precision_x(f):
    assert kept(f, jnp.ones((4, 16))) == [("float32", (4, 16))]
    assert kept(f, jnp.ones((4, 16), jnp.bfloat16)) == []


@pytest.mark.parametrize("f", KEEPS_A_MASK)
def test_a_mask_is_kept(f):
    assert kept(f, jnp.ones((4, 16))) == [("bool", (4, 16))]


@pytest.mark.parametrize(("columns", "bytes_a_row"), [(16, 2), (17, 3), (3, 1)])
def test_relu_keeps_bits(columns, bytes_a_row):
    assert kept(bits, jnp.ones((4, columns))) == [("uint8", (4, bytes_a_row))]


def test_rows_keep_two_numbers():
    rows = ("float32", (4, 1))
    x = jnp.ones((4, 16), jnp.bfloat16)
    assert kept(lambda x: fcg.logsumexp(x, -1), x) == [rows, rows]
    assert kept(fcg.softmax, x) == [("bfloat16", (4, 16))]
    assert kept(fcg.log_softmax, x) == [("bfloat16", (4, 16)), ("float32", (4, 1))]


@pytest.mark.parametrize("f", [fcg.swiglu, fcg.geglu, fcg.reglu])
def test_gate_and_up_are_all_that_is_kept(f):
    assert kept(f, jnp.ones((4, 16)), jnp.ones((4, 16))) == []


def test_glu_keeps_what_it_splits():
    assert kept(fcg.glu, jnp.ones((4, 16))) == []


def test_prelu_keeps_x_and_the_slope():
    graphdef, params = nnx.split(fcg.PReLU())
    assert kept(lambda p, x: nnx.merge(graphdef, p)(x), params, jnp.ones((4, 16))) == []


# One array a layer, and two at work.


@pytest.mark.parametrize("f", KEEPS_X + KEEPS_Y, ids=name)
def test_eight_layers_of_float32(f):
    assert temporaries(f, jnp.ones((256, 512))) < 10.2


@pytest.mark.parametrize("f", [fcg.gelu, exact, fcg.silu, fcg.softmax], ids=name)
def test_eight_layers_of_bfloat16(f):
    assert temporaries(f, jnp.ones((256, 512), jnp.bfloat16)) < 11.2


def test_eight_layers_of_masks():
    x = jnp.ones((256, 512))
    assert temporaries(fcg.relu, x) < 2 + 8 / 4 + 0.2
    assert temporaries(bits, x) < 2 + 8 / 32 + 0.2


@pytest.mark.parametrize("f", [fcg.swiglu, fcg.geglu, fcg.reglu])
def test_eight_gated_layers(f):
    assert temporaries(f, jnp.ones((256, 512)), jnp.ones((256, 512))) < 10.2


def test_nnx_keeps_more():
    x = jnp.ones((256, 512))
    assert temporaries(nnx.gelu, x) > 3 * temporaries(fcg.gelu, x)
    assert temporaries(nnx.silu, x) > 2.5 * temporaries(fcg.silu, x)
    assert temporaries(lambda g, u: nnx.gelu(g) * u, x, x) > 4 * temporaries(fcg.geglu, x, x)
