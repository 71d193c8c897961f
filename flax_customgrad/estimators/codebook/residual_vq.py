"""ResidualVQ: codebooks one after the other, each for what the last has left, arXiv:2107.03312.

Gradient and loss are those of `quantize`. The estimator is applied once, to z and the sum of the
codes. With one for each codebook, whose outputs are added up, a straight-through gradient would
arrive as many times as there are codebooks.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.codebook import codebook_arguments as check
from flax_customgrad.estimators.codebook.quantize_vectors import left_over, quantize
from flax_customgrad.estimators.codebook.usage import Quantized, use
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer
from flax_customgrad.numerics.argument_checks import check_size
from flax_customgrad.numerics.dtypes import widened


class ResidualVQ(nnx.Module):
    """Quantizes vectors by `num_quantizers` codebooks in turn, whose codes add up.

    With `features` of 64 and 1024 codes, 8 codebooks make 80 bits of a vector. What is said of
    gradients and learning at `VectorQuantizer` holds for each of them.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.ResidualVQ(3, 16, 4, learning="ema", rngs=nnx.Rngs(0))
        >>> out = layer(jnp.ones((8, 4)))
        >>> out.values.shape, out.indices.shape, out.usage.shape
        ((8, 4), (8, 3), (3,))
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        """Makes the codebooks.

        Args:
            num_quantizers: how many codebooks.
            num_codes: how many codes each has.
            features: how many numbers a code has.
            rngs: as for `VectorQuantizer`.
            **kwargs: what else `VectorQuantizer` takes, the same for each.

        Raises:
            ValueError: as for `VectorQuantizer`.
        """
        check_size(type(self).__name__, "num_quantizers", num_quantizers)
        self.features = features
        self.stages = nnx.List(
            [
                VectorQuantizer(num_codes, features, rngs=rngs, **kwargs)
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
            TypeError: z is no floating array.
            ValueError: z has another number of features.
        """
        z = check.vectors(type(self).__name__, z, self.features)
        (residual,) = widened(z.dtype, z)
        codebooks, indices = [], []
        for stage in self.stages:
            codes, numbers = stage.encode(residual, use_running_average)
            residual = left_over(residual, codes, numbers)
            codebooks.append(codes)
            indices.append(numbers)
        first = self.stages[0]
        learns = first.learning == "loss"
        values, loss = quantize(
            tuple(codebooks), z, tuple(indices), first.commitment, learns, first.gradient
        )
        uses = [use(numbers, first.num_codes, first.axis_name) for numbers in indices]
        perplexity, usage = (None if None in u else jnp.stack(u) for u in zip(*uses, strict=True))
        return Quantized(values, jnp.stack(indices, -1), loss, perplexity, usage)
