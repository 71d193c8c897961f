"""`Quantizer`: the interface of quantizers, which the quantized layers use."""

from abc import abstractmethod

import jax
from flax import nnx

from flax_customgrad.low_bit.quantizers.codes import Codes


class Quantizer(nnx.Module):
    """A layer that replaces each element by a value of few bits; the base of all quantizers.

    A subclass combines a scheme (forward and backward) with its state in `quantize`. A call returns
    the values; a quantized layer also uses their codes, which it keeps for the backward.

    Attributes:
        enabled: whether it quantizes; False leaves arrays as they are, also in quantized layers.
            Quantization that starts at a later step is a model that trains with
            `model.set_attributes(flax_customgrad.Quantizer, enabled=False)` before, and with True
            after; a compiled step is compiled anew.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> codes = fcg.FakeQuant(bits=4).quantize(jnp.array([-0.7, 0.26, 0.5]))
        >>> codes.values, codes.codes
        (Array([-0.7,  0.3,  0.5], dtype=float32), Array([ 0, 10, 12], dtype=uint8))
    """

    enabled: bool = True

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantizes an array.

        Args:
            x: array of any shape, float.

        Returns:
            Array like x, of values that have codes of few bits; x where it is not `enabled`.
        """
        return x if not self.enabled else self.quantize(x).values

    @abstractmethod
    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.

        Returns:
            The `Codes`: values like x, and codes of that shape, uint8 or uint16.
        """

    def observe(self, x: jax.Array) -> None:
        """Sets what the quantizer learns or records from an array.

        Args:
            x: array of any shape, float, like those to come.
        """

    def observe_weights(self, w: jax.Array) -> None:
        """Sets what the quantizer takes from the weights of the layer that gets it.

        Args:
            w: array of any shape, float.
        """
        self.observe(w)

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return ()

    def forget(self) -> None:
        """Empties what was recorded, so that the next array that is observed is the first."""
