"""`Quantizer`: the interface of quantizers, which the quantized layers use."""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.low_bit.quantizers.codes import Codes


class Quantizer(nnx.Module):
    """A layer that replaces each element by a value of few bits; the base of all quantizers.

    A subclass combines a scheme (forward and backward) with its state in `quantize`. A call returns
    the values; a quantized layer also uses their codes, which it keeps for the backward.

    Attributes:
        enabled: whether it quantizes; False leaves arrays as they are, also in quantized layers. It
            is set by `model.set_attributes(flax_customgrad.Quantizer, enabled=False)`: to a bool,
            for which a step is compiled anew; or to an array without axes, such as `step >= 1000`,
            or a Variable of one. Where that is traced both values are computed and one is chosen:
            a moving average is recorded before it is switched on too, and a quantized layer keeps
            its operands in place of their codes.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> codes = fcg.FakeQuant(bits=4).quantize(jnp.array([-0.7, 0.26, 0.5]))
        >>> codes.values, codes.codes
        (Array([-0.7,  0.3,  0.5], dtype=float32), Array([ 0, 10, 12], dtype=uint8))
    """

    enabled: bool | jax.Array | nnx.Variable = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; `enabled` may become an array, and a bool again."""
        if name == "enabled":
            if isinstance(value, jax.Array):
                # Floating: `nnx.grad` may differentiate every array of a model.
                value = nnx.data(value.astype(jnp.float32))
            else:
                value = nnx.data(value) if isinstance(value, nnx.Variable) else nnx.static(value)
        super().__setattr__(name, value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantizes an array.

        Args:
            x: array of any shape, float.

        Returns:
            Array like x, of values that have codes of few bits; x where it is not `enabled`.
        """
        found = self.quantize_if_enabled(x)
        return found.values if isinstance(found, Codes) else found

    def quantize_if_enabled(self, x: jax.Array) -> Codes | jax.Array:
        """Quantizes an array where the quantizer is enabled.

        Args:
            x: array of any shape, float.

        Returns:
            The `Codes`; x where it is not enabled; and where that is traced, the values or x.
        """
        enabled = self._is_enabled
        if is_traced(enabled):
            return jnp.where(enabled, self.quantize(x).values, x)
        return self.quantize(x) if enabled else x

    @property
    def may_be_enabled(self) -> bool:
        """Whether it is enabled, or may be: that is traced."""
        enabled = self._is_enabled
        return is_traced(enabled) or bool(enabled)

    @property
    def _is_enabled(self) -> bool | jax.Array:
        enabled = self.enabled[...] if isinstance(self.enabled, nnx.Variable) else self.enabled
        return enabled != 0

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
