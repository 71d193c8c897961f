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

from flax_customgrad.estimators.codebook.codebook_arguments import check_vectors
from flax_customgrad.estimators.codebook.quantize_vectors import (
    GradientEstimator,
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
        commitment: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        dead_below: float | None = None,
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
            commitment: weight of the commitment loss.
            decay: with "ema": how much of the statistics a call leaves, from 0 to below 1.
            epsilon: with "ema": constant of the Laplace smoothing of the counts, positive.
            dead_below: with "ema": a code whose average number of vectors per batch is below this
                is replaced by the remainder of a random vector of the batch; None for never.
            use_running_average: with "ema": use the codebooks without updating them.
            axis_name: axis of a `shard_map` or `pmap` over which to add up statistics.
            param_dtype: dtype of the codebooks; with "ema" it is at least float32.
            codebook_init: initializer of each codebook.
            rngs: `params` for the initializer, and with `dead_below` `codebook` for the draws.

        Raises:
            ValueError: `num_quantizers` is below 1, or an argument is refused by `VectorQuantizer`.
        """
        check_size(type(self).__name__, "num_quantizers", num_quantizers)
        self.features = features
        self.stages = nnx.List(
            [
                VectorQuantizer(
                    num_codes,
                    features,
                    gradient=gradient,
                    learning=learning,
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

    def __call__(self, z: Any, use_running_average: bool | None = None) -> Quantized:
        """Quantizes vectors, and in training with "ema" moves the codebooks.

        Args:
            z: array of shape (..., features), float.
            use_running_average: as for `VectorQuantizer`.

        Returns:
            A `Quantized`; its indices are of shape (..., num_quantizers), its perplexity and usage
            of shape (num_quantizers,). Residuals are in float32 or wider, and so is the sum.

        Raises:
            TypeError: z is not a floating array.
            ValueError: z has another number of features.
        """
        z = check_vectors(type(self).__name__, z, self.features)
        (r,) = widened(z.dtype, z)
        codebooks, indices = [], []
        for stage in self.stages:
            codes, numbers = stage.encode(r, use_running_average)
            r = remainder(r, codes, numbers)
            codebooks.append(codes)
            indices.append(numbers)
        first = self.stages[0]
        values, loss = quantize_vectors(
            tuple(codebooks),
            z,
            tuple(indices),
            first.commitment,
            first.learning == "loss",
            first.gradient,
        )
        usages = [measure_usage(k, first.num_codes, first.axis_name) for k in indices]
        perplexity, usage = (None if None in u else jnp.stack(u) for u in zip(*usages, strict=True))
        return Quantized(values, jnp.stack(indices, -1), loss, perplexity, usage)
