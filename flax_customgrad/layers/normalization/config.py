"""`NormConfig`: the choices of a normalization that are not arrays."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.devices import Devices

NormResidual = Literal["input", "output"]
"""What the backward keeps to find the normalized input again.

"input" is right where nothing else keeps either. "output" costs nothing where the next layer keeps
its input, as a Linear does. But it divides by the scale: digits are lost where |bias / scale| is
large and where the output is in half precision, and a scale of 0 is an error.
"""


@dataclass(frozen=True)
class NormConfig:
    """The choices of a normalization that are not arrays.

    Attributes:
        axes: the axes that share statistics, and those along which scale and bias vary.
        epsilon: added to the variance.
        dtype: dtype of the output, in which nnx rounds the input as well.
        centered: whether the mean is taken out.
        devices: the devices that share statistics.
        residual: what the backward keeps to find x_hat again, "input" or "output".
        with_statistics: whether the statistics are returned too, for a layer to write them down.
    """

    axes: NormAxes
    epsilon: float
    dtype: Any
    centered: bool = True
    devices: Devices = field(default_factory=Devices)
    residual: NormResidual = "input"
    with_statistics: bool = False

    @property
    def sum_dtype(self) -> Any:
        """The dtype of the statistics and of all sums: float32, or wider where `dtype` is."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def rounded(self, x: jax.Array) -> jax.Array:
        """An input rounded as nnx rounds it; one that `dtype` holds is left as it is."""
        is_exact = jnp.promote_types(x.dtype, self.dtype) == self.dtype
        return x if is_exact else x.astype(self.dtype)
