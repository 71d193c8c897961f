"""VectorQuantizer: each vector replaced by the nearest of a codebook.

Its parts: `nearest_code` finds the codes, `quantize_vectors` has the gradient and the loss,
`moving_average` and `dead_codes` move a codebook that is not learned by gradient, and `usage`
counts.

Source: arXiv:1711.00937
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.dead_codes import replace_dead_codes
from flax_customgrad.estimators.codebook.distance import Distance, nearest_direction, unit_vectors
from flax_customgrad.estimators.codebook.k_means import Nearest, initial_codes
from flax_customgrad.estimators.codebook.moving_average import MovingAverage, update_moving_average
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.estimators.codebook.quantize_vectors import (
    GradientEstimator,
    codes_at,
    quantize_vectors,
)
from flax_customgrad.estimators.codebook.usage import Quantized, measure_usage
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_nonnegative, check_size, check_word
from flax_customgrad.numerics.sharding import AxisName

Learning = Literal["loss", "ema"]

default_codebook_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Codebook(nnx.Variable):
    """Codes that no gradient moves, and statistics of them."""


class VectorQuantizer(nnx.Module):
    """Replaces each vector by the nearest of `num_codes`, and passes a gradient through.

    The gradient of the values reaches the input by the straight-through estimator or by the
    rotation trick (arXiv:2410.06424), which also carries the direction of the code. The codes learn
    by a loss, as a `Param`, or by an exponential moving average of their vectors, as state of the
    type `Codebook` that a call in training updates. `model.eval()` stops that, as for BatchNorm.

    Under jit the statistics of a moving average are those of the whole batch, however it is spread
    over devices; under `shard_map` and `pmap` with `axis_name`.

    Attributes:
        unit_codes: whether vectors and codes are scaled to unit norm.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.VectorQuantizer(16, 4, gradient="rotation", rngs=nnx.Rngs(0))
        >>> out = layer(jnp.ones((8, 4)))
        >>> out.values.shape, out.indices.shape, out.usage
        ((8, 4), (8,), Array(0.0625, dtype=float32))

    Source: arXiv:1711.00937
    """

    def __init__(
        self,
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
        use_running_average: bool = False,
        axis_name: AxisName = None,
        param_dtype: Any = jnp.float32,
        codebook_init: Callable[..., jax.Array] = default_codebook_init,
        rngs: nnx.Rngs,
    ):
        """Makes the codebook.

        Args:
            num_codes: how many codes.
            features: how many numbers a code has.
            gradient: "straight_through" or "rotation".
            learning: "loss" or "ema".
            distance: "euclidean"; or "cosine", for which vectors and codes are scaled to unit norm,
                through which the gradient passes, as in arXiv:2110.04627.
            commitment: weight of the commitment loss, which pulls vectors towards their codes.
            decay: with "ema": how much of the statistics a call leaves, from 0 to below 1.
            epsilon: with "ema": constant of the Laplace smoothing of the counts, positive.
            dead_below: with "ema": a code whose average number of vectors per batch is below this
                is replaced by a random vector of the batch; None for never.
            use_running_average: with "ema": use the codebook without updating it; set by
                `model.eval()` and `model.train()`.
            axis_name: axis of a `shard_map` or `pmap` over which to add up statistics.
            param_dtype: dtype of the codebook; with "ema" it is at least float32.
            codebook_init: initializer of the codebook; by default normal with vectors of a norm of
                about 1, like `nnx.Embed`.
            rngs: `params` for the initializer, and with `dead_below` `codebook` for the draws.

        Raises:
            ValueError: a number is out of the range stated above, `gradient`, `learning` or
                `distance` is not one of its two words, or `dead_below` is given with "loss".
        """
        name = type(self).__name__
        num_codes = check_size(name, "num_codes", num_codes)
        features = check_size(name, "features", features)
        check_word(name, "gradient", gradient, get_args(GradientEstimator))
        check_word(name, "learning", learning, get_args(Learning))
        check_word(name, "distance", distance, get_args(Distance))
        check_nonnegative(name, "commitment", commitment)
        if not 0 <= decay < 1:
            raise ValueError(f"{name}: decay={decay!r} must be at least 0 and below 1")
        if not epsilon > 0:
            raise ValueError(f"{name}: epsilon={epsilon!r} must be positive")
        if dead_below is not None:
            check_nonnegative(name, "dead_below", dead_below)
            if learning != "ema":
                raise ValueError(
                    f"{name}: dead_below={dead_below!r} needs the counts of a moving average: "
                    'write learning="ema", or dead_below=None'
                )
        self.num_codes = num_codes
        self.features = features
        self.gradient: GradientEstimator = gradient
        self.learning = learning
        self.distance: Distance = distance
        self.unit_codes = distance == "cosine"
        self.commitment = commitment
        self.decay = decay
        self.epsilon = epsilon
        self.dead_below = dead_below
        self.use_running_average = use_running_average
        self.axis_name = axis_name
        dtype = param_dtype if learning == "loss" else accumulator(jnp.dtype(param_dtype))
        codes = codebook_init(rngs.params(), (num_codes, features), dtype)
        if learning == "loss":
            self.codebook = nnx.Param(codes)
            return
        self.codebook = Codebook(codes)
        self.counts = Codebook(jnp.ones(num_codes, codes.dtype))
        # An array of its own: a step that donates its state would donate one twice.
        self.sums = Codebook(jnp.copy(codes))
        if dead_below is not None:
            self.rngs = rngs["codebook"].fork()

    def __call__(
        self,
        z: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes vectors, and in training with "ema" moves the codebook.

        Args:
            z: array of shape (..., features), float.
            use_running_average: whether to leave the codebook unchanged; None for the value that
                the constructor, `eval` or `train` has set.
            mask: bool array of shape (...): true for the vectors that count, false for padding. A
                vector that does not count has the value 0, the number num_codes and no gradient,
                and changes neither the loss, nor the codebook, nor how much of it is used.

        Returns:
            A `Quantized`. Its values are of the codebook as it was before the call. A vector with
            an element that is infinite or NaN has NaN for its value, and the number num_codes.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, or mask another shape.
        """
        z = check_vectors(type(self).__name__, z, self.features)
        mask = check_mask(type(self).__name__, mask, z)
        if self.unit_codes:
            z = unit_vectors(z)
        codes, indices = self.encode(z, use_running_average, mask)
        values, loss = quantize_vectors(
            (codes,),
            z,
            (indices,),
            (mask,),
            self.commitment,
            self.learning == "loss",
            self.gradient,
        )
        usage = measure_usage(indices, self.num_codes, self.axis_name)
        return Quantized(values, indices, loss, *usage)

    def codes(self) -> jax.Array:
        """The codes: array of shape (num_codes, features), of unit norm for "cosine"."""
        codes = self.codebook[...]
        return unit_vectors(codes) if self.unit_codes else codes

    def indices_to_codes(self, indices: jax.Array) -> jax.Array:
        """The codes that have certain numbers.

        Args:
            indices: integers of any shape, from 0 to num_codes - 1.

        Returns:
            Array of shape (*indices.shape, features), in the dtype of the codebook; NaN where no
            code has the number.
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

        Codes that are far from all vectors are never used; so begin with codes that are not. The
        counts of a moving average are then those of these vectors.

        Args:
            z: array of shape (..., features), float: vectors like those to come, better more than
                there are codes.
            iterations: how often the codes are moved to the mean of their vectors.
            mask: bool array of shape (...), false for padding.
            rngs: `codebook`, for the vectors that the codes begin as.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, no vector, or mask another shape;
                `iterations` is below 1.
        """
        found = initial_codes(
            type(self).__name__,
            z,
            (self.num_codes, self.features),
            iterations,
            mask,
            rngs,
            self.unit_codes,
            self._nearest,
        )
        variables = [self.codebook] if self.learning == "loss" else self._statistics
        for variable, value in zip(variables, found, strict=False):
            variable[...] = value.astype(variable.dtype)

    @property
    def _nearest(self) -> Nearest:
        """What finds the numbers of codes."""
        compares_directions = self.distance == "cosine" and not self.unit_codes
        return nearest_direction if compares_directions else nearest_code

    @property
    def _statistics(self) -> tuple[nnx.Variable[jax.Array], ...]:
        """The codebook of a moving average, and its counts and sums."""
        return self.codebook, self.counts, self.sums

    def encode(
        self,
        z: jax.Array,
        use_running_average: bool | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Finds codes, and in training with "ema" moves the codebook.

        Args:
            z: array of shape (..., features), float; of unit norm for "cosine".
            use_running_average: as for a call.
            mask: as for a call.

        Returns:
            The codes as they were before the call, of shape (num_codes, features), and the numbers
            of the codes, int32 of shape (...).
        """
        codes = self.codes()
        indices = self._nearest(z, codes)
        if mask is not None:
            indices = jnp.where(mask, indices, self.num_codes)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if self.learning == "ema" and not use_running_average and 0 not in z.shape:
            self._update_codebook(lax.stop_gradient(z), indices, mask)
        return codes, indices

    def _update_codebook(self, z: jax.Array, indices: jax.Array, mask: jax.Array | None) -> None:
        state = MovingAverage(*(variable[...] for variable in self._statistics))
        state = update_moving_average(state, z, indices, self.decay, self.epsilon, self.axis_name)
        if self.dead_below is not None:
            state = replace_dead_codes(state, z, self.dead_below, self.rngs(), self.axis_name, mask)
        for variable, value in zip(self._statistics, state, strict=True):
            variable[...] = value
