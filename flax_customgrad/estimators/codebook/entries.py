"""The catalogue's entries of the codebook family.

A formula finds the nearest codes by all distances, and sums over codes by one-hot vectors.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import entr

from flax_customgrad.estimators.codebook.code_entropy import code_distribution
from flax_customgrad.estimators.codebook.fsq import FSQ, round_to_levels
from flax_customgrad.estimators.codebook.lfq import LFQ, sign_codes
from flax_customgrad.estimators.codebook.quantize_vectors import quantize_vectors
from flax_customgrad.estimators.codebook.residual_vq import ResidualVQ
from flax_customgrad.estimators.codebook.rotation_trick import rotation_trick
from flax_customgrad.estimators.codebook.sim_vq import SimVQ
from flax_customgrad.estimators.codebook.straight_through_estimator import (
    straight_through_estimator,
)
from flax_customgrad.estimators.codebook.usage import Quantized
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import applied, made, normal

Gradients = tuple[nnx.State | None, jax.Array]


def _straight_through(z: jax.Array, q: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return g, None


def _rotated(z: jax.Array, q: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    """The formula of arXiv:2410.06424, with its undefined cases: vectors that are 0 or opposite."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, -1, keepdims=True)

    def length(x: jax.Array) -> jax.Array:
        squares = dot(x, x)
        return jnp.sqrt(jnp.where(squares == 0, 1, squares))

    z_is_zero, q_is_zero = dot(z, z) == 0, dot(q, q) == 0
    u, v = z / length(z), q / length(q)
    r = (u + v) / length(u + v)
    rotated = g - 2 * r * dot(r, g) + 2 * u * dot(v, g)
    reflected = g - 2 * u * dot(u, g)
    is_opposite = dot(u + v, u + v) < 1e-30
    stretch = jnp.where(q_is_zero, 0, length(q) / length(z))
    return jnp.where(z_is_zero, g, stretch * jnp.where(is_opposite, reflected, rotated)), None


_ESTIMATORS = {"straight_through": _straight_through, "rotation": _rotated}


def _nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
    distances = jnp.sum((z[..., None, :] - codes) ** 2, -1)
    return jax.nn.one_hot(jnp.argmin(distances, -1), len(codes), dtype=codes.dtype)


def _loss_gradients(
    z: jax.Array, chosen: jax.Array, codes: jax.Array, commitment: float, dloss: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `beta mean((z - sg q)^2) + mean((sg z - q)^2)` for z and for the codes."""
    of_difference = 2 * dloss * (z - chosen @ codes) / z.size
    return commitment * of_difference, -jnp.einsum("...k,...f->kf", chosen, of_difference)


def _vector_quantizer(layer: VectorQuantizer, z: jax.Array, g: Quantized) -> Gradients:
    codes = layer.codebook[...]
    chosen = _nearest(z, codes)
    dz, _ = _ESTIMATORS[layer.gradient](z, chosen @ codes, g.values)
    dz_of_loss, dcodes = _loss_gradients(z, chosen, codes, layer.commitment, g.loss)
    learned = layer.learning == "loss"
    return nnx.State({"codebook": dcodes}) if learned else None, dz + dz_of_loss


def _residual_vq(layer: ResidualVQ, z: jax.Array, g: Quantized) -> Gradients:
    total, dz_of_loss, dstages = jnp.zeros_like(z), jnp.zeros_like(z), {}
    for i, stage in enumerate(layer.stages):
        codes = stage.codebook[...]
        chosen = _nearest(z - total, codes)
        dresidual, dcodes = _loss_gradients(z - total, chosen, codes, stage.commitment, g.loss)
        dz_of_loss += dresidual
        dstages[i] = {"codebook": dcodes}
        total += chosen @ codes
    dz, _ = _ESTIMATORS[layer.stages[0].gradient](z, total, g.values)
    learned = layer.stages[0].learning == "loss"
    return nnx.State({"stages": dstages}) if learned else None, dz + dz_of_loss


def _sim_vq(layer: SimVQ, z: jax.Array, g: Quantized) -> Gradients:
    codebook = layer.codebook[...]
    codes = codebook @ layer.kernel[...]
    chosen = _nearest(z, codes)
    dz, _ = _ESTIMATORS[layer.gradient](z, chosen @ codes, g.values)
    dz_of_loss, dcodes = _loss_gradients(z, chosen, codes, layer.commitment, g.loss)
    return nnx.State({"kernel": codebook.T @ dcodes}), dz + dz_of_loss


def _fsq(layer: FSQ, z: jax.Array, g: Quantized) -> Gradients:
    levels = jnp.array(layer.levels)
    h = (levels - 1) * (1 + 1e-3) / 2
    shift = jnp.arctanh(jnp.where(levels % 2, 0, 0.5) / h)
    return None, g.values * h * (1 - jnp.tanh(z + shift) ** 2) / (levels // 2)


def _lfq(layer: LFQ, z: jax.Array, g: Quantized) -> Gradients:
    bits = jnp.arange(layer.num_codes)[:, None] >> jnp.arange(layer.features) & 1
    codes = layer.scale * (2 * bits - 1).astype(z.dtype)
    signs = jnp.where(z >= 0, layer.scale, -layer.scale).astype(z.dtype)

    def entropy(p: jax.Array) -> jax.Array:
        return jnp.sum(entr(p), -1)

    def loss(z: jax.Array) -> jax.Array:
        distances = jnp.sum((z[..., None, :] - codes) ** 2, -1)
        p = jax.nn.softmax(-distances / layer.temperature).reshape(-1, layer.num_codes)
        entropies = jnp.mean(entropy(p)) - layer.diversity * entropy(jnp.mean(p, 0))
        commitment = layer.commitment * jnp.mean((z - signs) ** 2)
        return layer.entropy_weight * entropies + commitment

    return None, g.values + g.loss * jax.grad(loss)(z)


def _values(layer: Callable[..., Quantized], z: jax.Array) -> jax.Array:
    return layer(z).values


def _few() -> jax.Array:
    return normal(8, 3, 4)


def _four_axes() -> jax.Array:
    return normal(8, 1, 3, 4)


def _four_axes_too() -> jax.Array:
    return normal(8, 1, 3, 4)[::-1]


def _singular_z() -> jax.Array:
    return _four_axes().at[0].set(0)


def _singular_q() -> jax.Array:
    """Zero vectors, where `_singular_z` has some and elsewhere; opposite and equal vectors."""
    z = _singular_z()
    q = _four_axes_too().at[0, 0, 0].set(0).at[1, 0, 0].set(0)
    return q.at[2].set(-2 * z[2]).at[3].set(z[3])


def _on_the_step() -> jax.Array:
    """Features of which some are 0, where the sign changes, or -0."""
    return normal(8, 1, 3, 5).at[::2, 0, 1, 2].set(0).at[::3, 0, 0, 0].set(-0.0)


def _far_out() -> jax.Array:
    return 4 * _four_axes()


def _many() -> jax.Array:
    return normal(16384, 64)


_INPUTS = {"inputs": (_few,)}
# A formula reads the codebook after the forward, which must not have changed it.
_FIXED_CODEBOOK = {"use_running_average": True, **_INPUTS}


def _without_rngs(*args: Any, inputs: Callable[[], jax.Array], **kwargs: Any) -> Example:
    """An example of a layer that has no parameters."""
    return lambda cls: (cls(*args, **kwargs), inputs())


def _values_workload(*args: Any, **kwargs: Any) -> Example:
    return made(*args, inputs=(_many,), call=_values, **kwargs)


def _curve_of_numbers(
    estimator: Callable[[jax.Array, jax.Array], jax.Array], low: float = -2.0
) -> Curve:
    """The curve of an estimator on numbers, with the nearest of -1.5, -0.5, 0.5 and 1.5."""

    def function(x: jax.Array) -> jax.Array:
        nearest = jnp.clip(jnp.floor(x), -2, 1) + 0.5
        return estimator(x[:, None], nearest[:, None])[:, 0]

    return Curve(function, low)


ENTRIES = (
    Entry(
        "straight_through_estimator",
        "codebook",
        straight_through_estimator,
        None,
        "surrogate",
        keeps="nothing",
        gain="the value is q to the bit",
        source="arXiv:1308.3432",
        formula=_straight_through,
        curves={"": _curve_of_numbers(straight_through_estimator)},
        examples={"4-D, an axis of size 1": applied(_four_axes, _four_axes_too)},
        operations={straight_through_estimator: "4-D, an axis of size 1"},
        workloads={"16384x64": applied(_many, lambda: _many()[::-1])},
    ),
    Entry(
        "rotation_trick",
        "codebook",
        rotation_trick,
        None,
        "surrogate",
        keeps="z, q",
        gain="as long as it should be for opposite vectors; norms of 1e-30 and 1e30",
        source="arXiv:2410.06424",
        formula=_rotated,
        curves={"": _curve_of_numbers(rotation_trick, low=0.1)},
        examples={"4-D, zero, opposite and equal vectors": applied(_singular_z, _singular_q)},
        operations={rotation_trick: "4-D, zero, opposite and equal vectors"},
        workloads={"16384x64": applied(_many, lambda: _many()[::-1])},
    ),
    Entry(
        "VectorQuantizer",
        "codebook",
        VectorQuantizer,
        None,
        "surrogate",
        keeps="z, the codes; 4 bytes a vector",
        gain="distances in blocks: 65536 codes and 16384 vectors in 17 MB a block, not 4.3 GB",
        source="arXiv:1711.00937",
        formula=_vector_quantizer,
        examples={
            "loss": made(16, 4, **_INPUTS),
            "rotation, ema": made(
                16, 4, gradient="rotation", learning="ema", commitment=0.5, **_FIXED_CODEBOOK
            ),
        },
        workloads={"8192 codes, 16384x64": _values_workload(8192, 64)},
    ),
    Entry(
        "ResidualVQ",
        "codebook",
        ResidualVQ,
        None,
        "surrogate",
        keeps="z, the codes; 4 bytes a vector and codebook",
        gain="the estimator once: the gradient does not grow with the number of stages",
        source="arXiv:2107.03312",
        formula=_residual_vq,
        examples={
            "rotation, loss, two codebooks, 4-D": made(
                2, 16, 4, gradient="rotation", commitment=0.5, inputs=(_four_axes,)
            ),
            "straight through, ema": made(2, 16, 4, learning="ema", **_FIXED_CODEBOOK),
        },
        operations={quantize_vectors: "rotation, loss, two codebooks, 4-D"},
        workloads={"4 x 1024 codes, 16384x64": _values_workload(4, 1024, 64)},
    ),
    Entry(
        "SimVQ",
        "codebook",
        SimVQ,
        None,
        "surrogate",
        keeps="z, the codes before and after the map; 4 bytes a vector",
        gain="composed: every vector moves all codes",
        source="arXiv:2411.02038",
        formula=_sim_vq,
        examples={
            "rotation": made(16, 4, **_INPUTS),
        },
        workloads={"8192 codes, 16384x64": _values_workload(8192, 64)},
    ),
    Entry(
        "FSQ",
        "codebook",
        FSQ,
        None,
        "surrogate",
        keeps="z",
        gain="accurate far out, and for more than 1000 levels",
        source="arXiv:2309.15505",
        formula=_fsq,
        curves={
            "5 levels": Curve(lambda x: FSQ((5,))(x[..., None]).values[..., 0]),
            "4 levels": Curve(lambda x: FSQ((4,))(x[..., None]).values[..., 0]),
        },
        examples={"odd and even, 4-D, far out": _without_rngs((5, 4, 3, 2), inputs=_far_out)},
        operations={round_to_levels: "odd and even, 4-D, far out"},
        workloads={
            "8 levels, 16384x6": lambda cls: (_values, cls((8, 8, 8, 5, 5, 5)), _many()[:, :6])
        },
    ),
    Entry(
        "LFQ",
        "codebook",
        LFQ,
        None,
        "surrogate",
        keeps="z; 2^features numbers for the entropy",
        gain="the entropy of 2^18 codes from two rows of 512 a vector",
        source="arXiv:2310.05737",
        formula=_lfq,
        curves={"scale 1": Curve(lambda x: LFQ(1)(x[..., None]).values[..., 0])},
        examples={
            "5 bits, 4-D, on the step": _without_rngs(
                5, scale=0.8, temperature=1.0, diversity=0.7, inputs=_on_the_step
            ),
        },
        operations={
            sign_codes: "5 bits, 4-D, on the step",
            code_distribution: "5 bits, 4-D, on the step",
        },
        workloads={"14 bits, 16384": lambda cls: (_values, cls(14), _many()[:, :14])},
    ),
)
