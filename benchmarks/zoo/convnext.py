"""A ConvNeXt: depthwise 7 x 7 convolutions, LayerNorm, and an inverted bottleneck with gelu.

Source: arXiv:2201.03545
"""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.task import Task, cross_entropy, images, integers


class Block(nnx.Module):
    """A depthwise convolution and two Linear layers, scaled by layer and added to the input."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(features, features, (7, 7), feature_group_count=features, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 4 * features, rngs=rngs)
        self.down = nnx.Linear(4 * features, features, rngs=rngs)
        self.scale = nnx.Param(jnp.full((features,), 0.1))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x`, of shape (batch, height, width, features)."""
        y = self.down(nnx.gelu(self.up(self.norm(self.conv(x)))))
        return x + self.scale[...] * y


class ConvNeXt(nnx.Module):
    """Patches of 4 x 4 pixels, stages of blocks with patches of 2 x 2 between, and a classifier."""

    def __init__(self, widths: tuple[int, ...], depth: int, classes: int, rngs: nnx.Rngs):
        layers: list[nnx.Module] = []
        features_in, patch = 3, 4
        for features in widths:
            if features_in > 3:
                layers.append(nnx.LayerNorm(features_in, rngs=rngs))
            layers.append(nnx.Conv(features_in, features, (patch, patch), patch, rngs=rngs))
            if features_in == 3:
                layers.append(nnx.LayerNorm(features, rngs=rngs))
            layers += [Block(features, rngs) for _ in range(depth)]
            features_in, patch = features, 2
        self.layers = nnx.List(layers)
        self.norm = nnx.LayerNorm(features_in, rngs=rngs)
        self.head = nnx.Linear(features_in, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Classifies images of shape (batch, height, width, 3)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(jnp.mean(x, axis=(1, 2))))


def task(tiny: bool = False) -> Task:
    """Images of 64 x 64 pixels in ten classes."""
    widths, depth, batch, pixels = ((4, 8), 1, 2, 16) if tiny else ((32, 64, 128), 2, 4, 64)
    model = ConvNeXt(widths, depth, 10, nnx.Rngs(0))
    return Task(model, images(batch, pixels), cross_entropy(integers(batch, below=10)))
