"""LFQ, lookup-free quantization: the sign of each feature.

    forward   y    = scale where z >= 0, -scale elsewhere
              loss = commitment sum (z - y)^2 / N                  N: how many numbers z has
    backward  dz   = g + 2 commitment dloss (z - y) / N
    kept      z, and a mask if there is one, whose vectors alone count

The 2^features codes are the corners of a cube, and nothing is looked up. What keeps them in use is
a loss on the probabilities of codes, `p(c | z)`, the softmax over c of `-|z - c|^2 / temperature`:

    entropy_weight (mean of H(p(. | z)) - diversity H(mean of p(. | z)))

It is least where the code of each vector is certain and all codes are equally likely;
`code_entropy` computes both entropies.

Source: arXiv:2310.05737
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.code_entropy import code_entropy
from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.masks import (
    count_vectors,
    where_code,
    where_mask,
    where_vector,
)
from flax_customgrad.estimators.codebook.usage import Quantized, measure_usage
from flax_customgrad.numerics.argument_checks import check_nonnegative, check_size
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.sharding import AxisName


class Residuals(NamedTuple):
    """What the backward of `sign_codes` keeps: only what the caller holds anyway."""

    z: jax.Array
    mask: jax.Array | None
    scale: float
    commitment: float


@custom_vjp(surrogate=True)
def sign_codes(
    z: jax.Array, mask: jax.Array | None, scale: float, commitment: float
) -> tuple[jax.Array, jax.Array]:
    """The sign of each number, times a scale, and the commitment loss.

    Args:
        z: array of shape (..., features), float.
        mask: bool array of shape (...), which vectors count; or None for all.
        scale: what the signs are multiplied by; it gets no gradient.
        commitment: weight of the commitment loss; it gets no gradient.

    Returns:
        Array of z's shape and dtype, NaN where z is, 0 for vectors that do not count; and the loss,
        a number in float32 or wider, 0 where there are no vectors.
    """
    squares = where_mask(mask, jnp.square(_difference(z, scale)))
    loss = commitment * jnp.sum(squares) / _count(z, mask)
    return where_mask(mask, _signs(z, scale)).astype(z.dtype), loss


def _fwd(
    z: jax.Array, mask: jax.Array | None, scale: float, commitment: float
) -> tuple[tuple[jax.Array, ...], Residuals]:
    return sign_codes(z, mask, scale, commitment), Residuals(z, mask, scale, commitment)


def _bwd(res: Residuals, cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array, None, None, None]:
    z, mask, (g, dloss) = res.z, res.mask, cotangents
    chex.assert_equal_shape([g, z])
    chex.assert_rank(dloss, 0)
    dz = g + 2 * res.commitment / _count(z, mask) * dloss * _difference(z, res.scale)
    chex.assert_equal_shape([dz, z])
    return where_mask(mask, dz), None, None, None


sign_codes.defvjp(_fwd, _bwd)


def _count(z: jax.Array, mask: jax.Array | None) -> Any:
    """`N`."""
    return z.shape[-1] * count_vectors(z, mask)


def _signs(z: jax.Array, scale: float) -> jax.Array:
    return jnp.where(jnp.isnan(z), z, jnp.where(z >= 0, scale, -scale))


def _difference(z: jax.Array, scale: float) -> jax.Array:
    """`z - y`, in float32 or wider."""
    (z,) = widened(z.dtype, z)
    return z - _signs(z, scale)


class LFQ(nnx.Module):
    """Replaces each feature by its sign times `scale`; 2^features codes without a codebook.

    It has no parameters. Its loss needs 2^features numbers for the second entropy, but no array of
    2^features for each vector. Under jit that entropy is of all vectors, however they are spread
    over devices; under `shard_map`, `pmap` and `vmap` with `axis_name`, as is the usage.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> out = fcg.LFQ(3)(jnp.array([[0.3, -2.0, 0.0]]))
        >>> out.values, out.indices
        (Array([[ 1., -1.,  1.]], dtype=float32), Array([5], dtype=int32))

    Source: arXiv:2310.05737
    """

    def __init__(
        self,
        features: int,
        *,
        scale: float = 1.0,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        commitment: float = 0.25,
        axis_name: AxisName = None,
    ):
        """Makes the layer.

        Args:
            features: how many numbers a vector has, at most 30.
            scale: how large codes are, positive.
            entropy_weight: weight of the entropies.
            diversity: weight of the entropy of the batch relative to that of each vector.
            temperature: temperature of the softmax of squared distances; positive.
            commitment: weight of the commitment loss.
            axis_name: axis of a `shard_map`, `pmap` or `vmap` over which vectors are parts of one
                batch.

        Raises:
            ValueError: `features` is not from 1 to 30, a weight is negative, or `scale` or
                `temperature` is not positive.
        """
        features = check_size("LFQ", "features", features)
        if features > 30:
            raise ValueError(
                f"LFQ: features={features} make 2**{features} codes; int32 has numbers for up to "
                "30 features. Split them over several layers"
            )
        for name, value in (
            ("entropy_weight", entropy_weight),
            ("diversity", diversity),
            ("commitment", commitment),
        ):
            check_nonnegative("LFQ", name, value)
        for name, value in (("scale", scale), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"LFQ: {name}={value!r} must be positive")
        self.features = features
        self.num_codes = 2**features
        self.scale = scale
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.temperature = temperature
        self.commitment = commitment
        self.axis_name = axis_name

    @promoting
    def __call__(self, z: jax.Array, *, mask: jax.Array | None = None) -> Quantized:
        """Quantizes vectors.

        Args:
            z: array of shape (..., features), float.
            mask: bool array of shape (...), false for padding; as for `VectorQuantizer`.

        Returns:
            A `Quantized`. A number has bit i where feature i is positive or 0. NaN stays NaN, and
            the number of its vector is num_codes.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, or mask another shape.
        """
        z = check_vectors("LFQ", z, self.features)
        mask = check_mask("LFQ", mask, z)
        z = where_mask(mask, z)
        bits = (z >= 0) * 2 ** jnp.arange(self.features, dtype=jnp.int32)
        indices = jnp.sum(bits, -1, dtype=jnp.int32)
        indices = where_vector(mask, z, indices, self.num_codes)
        values, loss = sign_codes(z, mask, self.scale, self.commitment)
        if self.entropy_weight:
            # -|z - c|^2 is 2 z.c, but for terms that do not depend on c.
            sharpness = 4 * self.scale / self.temperature
            each, together = code_entropy(z, sharpness, self.axis_name, mask)
            loss += self.entropy_weight * (each - self.diversity * together)
        return Quantized(
            values, indices, loss, *measure_usage(indices, self.num_codes, self.axis_name)
        )

    @promoting
    def indices_to_codes(self, indices: jax.Array) -> jax.Array:
        """The codes that have certain numbers.

        Args:
            indices: integers of any shape, from 0 to num_codes - 1.

        Returns:
            Array of shape (*indices.shape, features), float32; NaN where no code has the number.
        """
        indices = jnp.asarray(indices)
        bits = indices[..., None] >> jnp.arange(self.features, dtype=jnp.int32) & 1
        codes = jnp.where(bits == 1, self.scale, -self.scale).astype(jnp.float32)
        return where_code(indices, self.num_codes, codes)
