"""ResidualVQ: codebooks one after the other, each for the remainder that the last one left.

Gradient and loss are those of `quantize_vectors`. The estimator is applied once, to `z` and the sum
of the codes. With one estimator for each codebook, and their outputs added up, a straight-through
gradient would be multiplied by the number of codebooks.

Source: arXiv:2107.03312
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.distance import Distance
from flax_customgrad.estimators.codebook.masks import where_mask
from flax_customgrad.estimators.codebook.quantize_vectors import (
    GradientEstimator,
    Masks,
    quantize_vectors,
    remainder,
)
from flax_customgrad.estimators.codebook.usage import Quantized, measure_usage
from flax_customgrad.estimators.codebook.vector_quantizer import (
    Learning,
    VectorQuantizer,
    default_codebook_init,
)
from flax_customgrad.numerics.argument_checks import check_size
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.sharding import AxisName


class ResidualVQ(nnx.Module):
    """Quantizes vectors by `num_quantizers` codebooks in turn, whose codes add up.

    With 1024 codes, 8 codebooks encode a vector of 64 features in 80 bits. Gradients and learning
    of each codebook are those of `VectorQuantizer`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.ResidualVQ(3, 16, 4, learning="ema", rngs=nnx.Rngs(0))
        >>> out = layer(jnp.ones((8, 4)))
        >>> out.values.shape, out.indices.shape, out.usage.shape
        ((8, 4), (8, 3), (3,))

    Source: arXiv:2107.03312
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        features: int,
        *,
        gradient: GradientEstimator = "straight_through",
        learning: Learning = "loss",
        distance: Distance = "euclidean",
        commitment: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        dead_below: float | None = None,
        quantizer_dropout: float = 0.0,
        use_running_average: bool = False,
        axis_name: AxisName = None,
        param_dtype: Any = jnp.float32,
        codebook_init: Callable[..., jax.Array] = default_codebook_init,
        rngs: nnx.Rngs,
    ):
        """Makes the codebooks; all arguments but the first are those of `VectorQuantizer`.

        Args:
            num_quantizers: how many codebooks.
            num_codes: how many codes each has.
            features: how many numbers a code has.
            gradient: "straight_through" or "rotation".
            learning: "loss" or "ema".
            distance: "euclidean"; or "cosine", by which a codebook finds the code whose direction
                is nearest to that of the remainder, as in arXiv:2306.06546. Codes keep their
                lengths, other than those of a `VectorQuantizer`: they have to add up to vectors.
            commitment: weight of the commitment loss.
            decay: with "ema": how much of the statistics a call leaves, from 0 to below 1.
            epsilon: with "ema": constant of the Laplace smoothing of the counts, positive.
            dead_below: with "ema": a code whose average number of vectors per batch is below this
                is replaced by the remainder of a random vector of the batch; None for never.
            quantizer_dropout: the probability with which an example, an index of the first axis of
                the vectors, is quantized by the first codebooks alone in training (see
                `nnx.Module.eval`): by k of them, each k from 1 to num_quantizers as likely. Then
                every number of codebooks decodes well.
            use_running_average: with "ema": use the codebooks without updating them.
            axis_name: axis of a `shard_map` or `pmap` over which to add up statistics.
            param_dtype: dtype of the codebooks; with "ema" it is at least float32.
            codebook_init: initializer of each codebook.
            rngs: `params` for the initializer, and `codebook` for the draws of `dead_below` and of
                `quantizer_dropout`.

        Raises:
            ValueError: `num_quantizers` is below 1, `quantizer_dropout` is not from 0 to 1, or an
                argument is refused by `VectorQuantizer`.
        """
        num_quantizers = check_size(type(self).__name__, "num_quantizers", num_quantizers)
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(
                f"{type(self).__name__}: quantizer_dropout={quantizer_dropout!r} must be a "
                "probability, from 0 to 1"
            )
        self.features = check_size(type(self).__name__, "features", features)
        self.quantizer_dropout = quantizer_dropout
        self.deterministic = False
        self.stages = nnx.List(
            [
                VectorQuantizer(
                    num_codes,
                    features,
                    gradient=gradient,
                    learning=learning,
                    distance=distance,
                    commitment=commitment,
                    decay=decay,
                    epsilon=epsilon,
                    dead_below=dead_below,
                    use_running_average=use_running_average,
                    axis_name=axis_name,
                    param_dtype=param_dtype,
                    codebook_init=codebook_init,
                    rngs=rngs,
                )
                for _ in range(num_quantizers)
            ]
        )
        for stage in self.stages:
            stage.unit_codes = False
        if quantizer_dropout:
            self.rngs = rngs["codebook"].fork()

    def __call__(
        self,
        z: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes vectors, and in training with "ema" moves the codebooks.

        Args:
            z: array of shape (..., features), float.
            use_running_average: as for `VectorQuantizer`.
            mask: bool array of shape (...), false for padding; as for `VectorQuantizer`.

        Returns:
            A `Quantized`; its indices are of shape (..., num_quantizers), its perplexity and usage
            of shape (num_quantizers,). Residuals are in float32 or wider, and so is the sum. Where
            a codebook is dropped its number is num_codes.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, or mask another shape.
        """
        z = check_vectors(type(self).__name__, z, self.features)
        masks = self._masks(z, check_mask(type(self).__name__, mask, z))
        (r,) = widened(z.dtype, z)
        codebooks, indices = [], []
        for stage, used in zip(self.stages, masks, strict=True):
            codes, numbers = stage.encode(r, use_running_average, used)
            r = remainder(r, codes, numbers, used)
            codebooks.append(codes)
            indices.append(numbers)
        first = self.stages[0]
        values, loss = quantize_vectors(
            tuple(codebooks),
            z,
            tuple(indices),
            masks,
            first.commitment,
            first.learning == "loss",
            first.gradient,
        )
        usages = [measure_usage(k, first.num_codes, first.axis_name) for k in indices]
        perplexity, usage = (None if None in u else jnp.stack(u) for u in zip(*usages, strict=True))
        return Quantized(values, jnp.stack(indices, -1), loss, perplexity, usage)

    def indices_to_codes(self, indices: jax.Array) -> jax.Array:
        """The sums of codes that have certain numbers.

        Args:
            indices: integers of shape (..., k), from 0 to num_codes - 1: the numbers of the first k
                codebooks, from 1 to num_quantizers. Of the codebooks after the first, num_codes
                adds nothing, as where one was dropped.

        Returns:
            Array of shape (..., features), float32 or wider; NaN where no code has the number.

        Raises:
            ValueError: there are no numbers, or more than codebooks.
        """
        indices = jnp.asarray(indices)
        if not indices.ndim or not 1 <= indices.shape[-1] <= len(self.stages):
            raise ValueError(
                f"{type(self).__name__}: indices have shape {indices.shape}; their last axis must "
                f"have the numbers of 1 to {len(self.stages)} codebooks"
            )
        found = []
        for i, stage in enumerate(self.stages[: indices.shape[-1]]):
            numbers = indices[..., i]
            used = numbers != stage.num_codes if i else None
            numbers = numbers if used is None else jnp.where(used, numbers, 0)
            (codes,) = widened(jnp.float32, stage.indices_to_codes(numbers))
            found.append(where_mask(used, codes))
        return sum(found[1:], found[0])

    def initialize_codebook(
        self,
        z: jax.Array,
        *,
        iterations: int = 10,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets the codes of each codebook by k-means, of what those before it leave of vectors.

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
        z = check_vectors(type(self).__name__, z, self.features)
        mask = check_mask(type(self).__name__, mask, z)
        (r,) = widened(z.dtype, z)
        for stage in self.stages:
            stage.initialize_codebook(r, iterations=iterations, mask=mask, rngs=rngs)
            r = remainder(r, *stage.encode(r, True, mask), mask)

    def _masks(self, z: jax.Array, mask: jax.Array | None) -> Masks:
        """Which vectors each codebook quantizes."""
        n = len(self.stages)
        if not self.quantizer_dropout or self.deterministic:
            return (mask,) * n
        # An axis for the examples, and axes of size 1 for what is of one example.
        axes = z.shape[: min(1, z.ndim - 1)] + (1,) * (z.ndim - 2)
        is_dropped, number = jax.random.split(self.rngs())
        used = jax.random.randint(number, axes, 1, n + 1)
        used = jnp.where(jax.random.bernoulli(is_dropped, self.quantizer_dropout, axes), used, n)
        masks = (jnp.broadcast_to(used > i, z.shape[:-1]) for i in range(1, n))
        return (mask, *(used if mask is None else used & mask for used in masks))
