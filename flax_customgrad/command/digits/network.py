"""The network of `train`: two convolutions and two dense layers, all of them of flax.nnx."""

import jax
from flax import nnx


class Network(nnx.Module):
    """A network from an image of a digit to a logit for each of ten classes."""

    def __init__(self, rngs: nnx.Rngs):
        # A bias in front of BatchNorm would be subtracted again: its gradient is rounding alone.
        self.conv_1 = nnx.Conv(1, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv_2 = nnx.Conv(32, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dense_1 = nnx.LinearGeneral((4, 4, 64), 128, axis=(-3, -2, -1), rngs=rngs)
        self.dense_2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array, training: bool) -> jax.Array:
        """Applies the network.

        Args:
            images: array of shape (n, 8, 8, 1).
            training: whether BatchNorm takes its statistics from these images and records them.

        Returns:
            Logits of shape (n, 10).
        """
        use_running_average = not training
        x = nnx.relu(self.norm_1(self.conv_1(images), use_running_average))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.norm_2(self.conv_2(x), use_running_average))
        return self.dense_2(nnx.gelu(self.dense_1(x)))
