"""`Lowering`: what each way of computing a convolution provides."""

import abc

import jax

from flax_customgrad.layers.conv.geometry import Geometry


class Lowering(abc.ABC):
    """A way to compute the two maps of `geometry`, for the shapes that it fits.

    The gradient of a convolution's input is a convolution, `correlate` of the transposed geometry,
    so these two are all that a forward and a backward need.
    """

    @abc.abstractmethod
    def fits(self, geometry: Geometry) -> bool:
        """Whether this lowering computes convolutions of a geometry.

        Args:
            geometry: any.
        """

    @abc.abstractmethod
    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """The convolution of x by a kernel.

        Args:
            x: array of shape (batch, *size, in_features).
            w: array of shape (*window, in_features // groups, out_features), of the dtype of x.
            geometry: one that fits.

        Returns:
            Array of shape (batch, *out, out_features).
        """

    @abc.abstractmethod
    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """The gradient of the kernel.

        Args:
            x: array of shape (batch, *size, in_features).
            g: array of shape (batch, *out, out_features), the cotangent of `correlate`.
            geometry: one that fits.

        Returns:
            Array of shape (*window, in_features // groups, out_features).
        """
