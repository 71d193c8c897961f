"""SimVQ: a fixed random codebook, followed by a linear map that learns.

    codes = codebook kernel       codebook: random and fixed, kernel: learned

A code that no vector is near gets no gradient, so in a learned codebook it would never move. Here
every vector moves the kernel, and the kernel moves all codes.

The backward is composed: gradient and loss are those of `quantize_vectors`, whose codebook loss
reaches the kernel through JAX's VJP of the product, and for "cosine" of the division by the norm.

Source: arXiv:2411.02038
"""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.distance import Distance, unit_vectors
from flax_customgrad.estimators.codebook.k_means import initial_codes
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.estimators.codebook.quantize_vectors import (
    GradientEstimator,
    codes_at,
    quantize_vectors,
)
from flax_customgrad.estimators.codebook.usage import Quantized, measure_usage
from flax_customgrad.estimators.codebook.vector_quantizer import Codebook, default_codebook_init
from flax_customgrad.numerics.argument_checks import check_nonnegative, check_size, check_word
from flax_customgrad.numerics.dtypes import widened

default_kernel_init = nnx.initializers.lecun_normal()


class SimVQ(nnx.Module):
    """Replaces each vector by the nearest of fixed codes that a learned linear map has moved.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.SimVQ(16, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((8, 4))).values.shape
        (8, 4)

    Source: arXiv:2411.02038
    """

    def __init__(
        self,
        num_codes: int,
        features: int,
        *,
        gradient: GradientEstimator = "rotation",
        distance: Distance = "euclidean",
        commitment: float = 0.25,
        param_dtype: Any = jnp.float32,
        codebook_init: Callable[..., jax.Array] = default_codebook_init,
        kernel_init: Callable[..., jax.Array] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        """Makes the codebook and the map.

        Args:
            num_codes: how many codes.
            features: how many numbers a code has.
            gradient: "straight_through" or "rotation".
            distance: "euclidean"; or "cosine", for which vectors, and codes after the map, are
                scaled to unit norm, through which the gradient passes.
            commitment: weight of the commitment loss; that of the codebook loss is 1.
            param_dtype: dtype of the codebook and of the kernel.
            codebook_init: initializer of the codebook, of shape (num_codes, features).
            kernel_init: initializer of the map, of shape (features, features).
            rngs: `params` for both.

        Raises:
            ValueError: `num_codes` or `features` is below 1, `commitment` is negative, or
                `gradient` or `distance` is not one of its two words.
        """
        name = type(self).__name__
        num_codes = check_size(name, "num_codes", num_codes)
        features = check_size(name, "features", features)
        check_word(name, "gradient", gradient, get_args(GradientEstimator))
        check_word(name, "distance", distance, get_args(Distance))
        check_nonnegative(name, "commitment", commitment)
        self.num_codes = num_codes
        self.features = features
        self.gradient: GradientEstimator = gradient
        self.distance: Distance = distance
        self.commitment = commitment
        self.codebook = Codebook(codebook_init(rngs.params(), (num_codes, features), param_dtype))
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features, features), param_dtype))

    def codes(self) -> jax.Array:
        """The current codes: array of shape (num_codes, features), float32 or wider.

        They are of unit norm for "cosine".
        """
        codebook, kernel = lax.stop_gradient(self.codebook[...]), self.kernel[...]
        codebook, kernel = widened(jnp.result_type(codebook, kernel), codebook, kernel)
        codes = jnp.matmul(codebook, kernel, precision=lax.Precision.HIGHEST)
        return unit_vectors(codes) if self.distance == "cosine" else codes

    def indices_to_codes(self, indices: jax.Array) -> jax.Array:
        """The codes that have certain numbers.

        Args:
            indices: integers of any shape, from 0 to num_codes - 1.

        Returns:
            Array of shape (*indices.shape, features), float32 or wider; NaN where no code has the
            number.
        """
        return codes_at(self.codes(), indices)

    def initialize_codebook(
        self,
        z: jax.Array,
        *,
        iterations: int = 10,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets the codes to the means of vectors, by k-means, such as of a first batch.

        The codebook, which stays fixed, becomes the means, and the kernel, which goes on learning,
        the identity. Call it before training: what the kernel had learned is gone.

        Args:
            z: array of shape (..., features), float: vectors like those to come.
            iterations: how often the codes are moved to the mean of their vectors.
            mask: bool array of shape (...), false for padding.
            rngs: `codebook`, for the vectors that the codes begin as.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, no vector, or mask another shape;
                `iterations` is below 1.
        """
        name, shape = type(self).__name__, (self.num_codes, self.features)
        unit = self.distance == "cosine"
        found = initial_codes(name, z, shape, iterations, mask, rngs, unit)
        self.codebook[...] = found.codes.astype(self.codebook.dtype)
        self.kernel[...] = jnp.eye(self.features, dtype=self.kernel.dtype)

    def __call__(self, z: jax.Array, *, mask: jax.Array | None = None) -> Quantized:
        """Quantizes vectors.

        Args:
            z: array of shape (..., features), float.
            mask: bool array of shape (...), false for padding; as for `VectorQuantizer`.

        Returns:
            A `Quantized`. A vector with an element that is infinite or NaN has NaN for its value,
            and the number num_codes.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, or mask another shape.
        """
        z = check_vectors(type(self).__name__, z, self.features)
        mask = check_mask(type(self).__name__, mask, z)
        if self.distance == "cosine":
            z = unit_vectors(z)
        codes = self.codes()
        indices = nearest_code(z, codes)
        if mask is not None:
            indices = jnp.where(mask, indices, self.num_codes)
        values, loss = quantize_vectors(
            (codes,), z, (indices,), (mask,), self.commitment, True, self.gradient
        )
        return Quantized(values, indices, loss, *measure_usage(indices, self.num_codes))
