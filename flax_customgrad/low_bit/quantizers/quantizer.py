"""`Quantizer`: what the quantized layers ask of a quantizer."""

from abc import abstractmethod

import jax
from flax import nnx

from flax_customgrad.low_bit.quantizers.codes import Codes


class Quantizer(nnx.Module):
    """A layer that puts a value of few bits in the place of each element.

    A subclass has a scheme (forward and backward) and its state, and says how both come together in
    `quantize`. Called, it returns the values; a quantized layer also takes their codes, to keep.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> codes = fcg.FakeQuant(bits=4).quantize(jnp.array([-0.7, 0.26, 0.5]))
        >>> codes.values, codes.codes
        (Array([-0.7,  0.3,  0.5], dtype=float32), Array([ 0, 10, 12], dtype=uint8))
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantizes an array.

        Args:
            x: array of any shape, float.

        Returns:
            Array like x, of values that few bits tell apart.
        """
        return self.quantize(x).values

    @abstractmethod
    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array, and says which code each value has.

        Args:
            x: array of any shape, float.
        """

    def observe(self, x: jax.Array) -> None:
        """Sets from an array what the quantizer learns or records; not for traced arrays.

        Args:
            x: array of any shape, float, like those to come.
        """
