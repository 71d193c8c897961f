"""`Sampler`: the base of the layers that sample, with a temperature, an axis and keys."""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.numerics.argument_checks import check_positive
from flax_customgrad.numerics.dtypes import as_array

KeySource = nnx.Rngs | nnx.RngStream | jax.Array | None
"""Where a key comes from: streams, one stream, or the key itself."""


class Sampler(nnx.Module):
    """A layer without parameters that samples, in the manner of `nnx.Dropout`.

    A subclass computes its result from logits, a key and a temperature in `_choose`.

    Attributes:
        temperature: a number, an array or a Variable.
        axis: the axis of the classes.
        deterministic: if true, nothing is sampled.
        rng_collection: the stream of an `nnx.Rngs` that keys come from.
        rngs: the layer's own stream, or None.
    """

    def __init__(
        self,
        temperature: Any,
        axis: int,
        deterministic: bool | None,
        rng_collection: str,
        rngs: nnx.Rngs | nnx.RngStream | None,
    ):
        check_positive(type(self).__name__, "temperature", as_array(temperature))
        self.temperature = temperature
        self.axis = axis
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[rng_collection]
        self.rngs = nnx.data(None) if rngs is None else rngs.fork()

    def __call__(
        self,
        logits: jax.Array,
        *,
        temperature: Any = None,
        deterministic: bool | None = None,
        rngs: KeySource = None,
    ) -> jax.Array:
        """Chooses classes of each row.

        Args:
            logits: array of any shape, float; -inf masks a class.
            temperature: used instead of the layer's; it may be traced.
            deterministic: used instead of the layer's; if true, nothing is sampled.
            rngs: used instead of the layer's: streams, one stream, or a key.

        Returns:
            Array like logits, which the function of the same name returns.

        Raises:
            TypeError: the logits are not floating.
            ValueError: the function of the same name refuses the logits or the temperature, neither
                layer nor call gives `deterministic`, or neither gives `rngs` to sample with.
        """
        key = self.key(deterministic, rngs)
        temperature = self.temperature if temperature is None else temperature
        return self._choose(logits, key, temperature)

    def _choose(self, logits: jax.Array, key: jax.Array | None, temperature: Any) -> jax.Array:
        """What the layer returns; each subclass has its own."""
        raise NotImplementedError

    def key(self, deterministic: bool | None, rngs: KeySource) -> jax.Array | None:
        """The key of the next sample; None if nothing is to be sampled.

        Args:
            deterministic: used instead of the layer's.
            rngs: used instead of the layer's.

        Raises:
            ValueError: neither layer nor call gives `deterministic`, or neither gives `rngs` to
                sample with.
        """
        name = type(self).__name__
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(f"{name}: give `deterministic` to the constructor or to the call")
        if deterministic:
            return None
        if rngs is None:
            rngs = self.rngs
        if rngs is None:
            raise ValueError(
                f"{name}: a sample needs a key: give `rngs` to the constructor or to the call, or "
                "deterministic=True"
            )
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[self.rng_collection]
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
            deterministic: if True, nothing is sampled.
        """
        if deterministic is not None:
            self.deterministic = deterministic
