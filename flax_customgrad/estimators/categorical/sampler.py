"""Sampler: what the layers of this family hold, a temperature and where their keys come from."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.module import first_from

from flax_customgrad.numerics.argument_checks import check_positive
from flax_customgrad.numerics.dtypes import as_array

Rngs = nnx.Rngs | nnx.RngStream | jax.Array | None
"""Where a key comes from: streams, one stream, or the key itself."""


class Sampler(nnx.Module):
    """A layer without parameters that samples, in the manner of `nnx.Dropout`.

    Attributes:
        temperature: a number, an array or a Variable.
        axis: the axis of the classes.
        deterministic: if true, nothing is sampled.
        rng_collection: the stream of an `nnx.Rngs` that keys are taken from.
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

    def key(self, deterministic: bool | None, rngs: Rngs) -> jax.Array | None:
        """The key of the next sample; None if nothing is to be sampled.

        Args:
            deterministic: takes the place of the layer's.
            rngs: takes the place of the layer's.

        Raises:
            ValueError: neither is given anywhere.
        """
        name = type(self).__name__
        deterministic = first_from(
            deterministic,
            self.deterministic,
            error_msg=f"{name}: give `deterministic` to the constructor or to the call",
        )
        if deterministic:
            return None
        rngs = first_from(
            rngs,
            self.rngs,
            error_msg=f"{name}: a sample needs a key: give `rngs` to the constructor or to the "
            "call, or deterministic=True",
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
