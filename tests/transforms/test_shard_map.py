"""The gradient inside a `shard_map` is that of one device, wherever parameters and inputs live.

What is composed of JAX's VJP of another operation takes that at other values than its arguments: a
fixed kernel in place of the layer's own, or the kernel before it was quantized.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg

RNGS = nnx.Rngs(0)
LAYERS = {
    "FeedbackLinear": (fcg.FeedbackLinear(8, 6, rngs=RNGS), (4, 8)),
    "FeedbackConv": (fcg.FeedbackConv(2, 3, (3,), rngs=RNGS), (4, 5, 2)),
    "DirectFeedback": (
        fcg.DirectFeedback(fcg.Linear(8, 7, rngs=RNGS), fcg.Linear(7, 6, rngs=RNGS), rngs=RNGS),
        (4, 8),
    ),
    "Conv": (fcg.Conv(2, 3, (3,), rngs=RNGS), (4, 5, 2)),
    "QuantLinear": (
        fcg.QuantLinear(8, 6, weight=fcg.TQT(4), residuals="original", rngs=RNGS),
        (4, 8),
    ),
    "Int8Linear": (fcg.Int8Linear(8, 6, rngs=RNGS), (4, 8)),
    "QLoRALinear": (
        fcg.QLoRALinear(8, 6, lora_rank=2, b_initializer=nnx.initializers.ones, rngs=RNGS),
        (4, 8),
    ),
}


def _varying(tree):
    return jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying"), tree)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_one_device(name):
    layer, shape = LAYERS[name]
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), shape)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def gradient(params, rest, x):
        return jax.grad(lambda p, x: (nnx.merge(graphdef, p, rest)(x) ** 2).sum(), (0, 1))(
            params, x
        )

    def summed(tree):
        return jax.tree.map(lambda a: jax.lax.psum(a, "data"), tree)

    def shared(params, rest, x):
        return gradient(params, rest, x)

    def of_each_device(params, rest, x):
        dparams, dx = gradient(_varying(params), rest, x)
        return summed(dparams), dx

    def unknown(params, rest, x):
        dparams, dx = gradient(params, rest, x)
        return summed(dparams), dx

    def of_the_same_inputs(params, rest, x):
        """Each device has parameters of its own, and all inputs."""
        dparams, dx = gradient(_varying(params), rest, x)
        return jax.tree.map(lambda a: a / 2, (summed(dparams), dx))

    def of_one_parameter(params, rest, x):
        """Each device has one parameter of its own, the last; the rest they share, and inputs."""
        leaves, structure = jax.tree.flatten(params)
        mixed = jax.tree.unflatten(structure, [*leaves[:-1], _varying(leaves[-1])])
        dparams, dx = gradient(mixed, rest, x)
        *of_shared, of_last = jax.tree.leaves(dparams)
        dparams = jax.tree.unflatten(structure, [*of_shared, summed(of_last)])
        return jax.tree.map(lambda a: a / 2, (dparams, dx))

    def program(params, rest, x):
        found = [gradient(params, rest, x)]
        for local, place, check_vma in (
            (shared, P("data"), True),
            (of_each_device, P("data"), True),
            (unknown, P("data"), False),
            (of_the_same_inputs, P(), True),
            (of_one_parameter, P(), True),
        ):
            spread = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(P(), P(), place),
                out_specs=(P(), place),
                check_vma=check_vma,
            )
            found.append(spread(params, rest, x))
        return found

    expected, *found = jax.jit(program)(params, rest, x)
    for got in found:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected
        )
