"""Whole models, written with flax.nnx as anybody would: what `benchmarks.models` measures.

None of them knows of flax_customgrad. A file per model, with what it is trained on; each comes in
a size of which a step takes tens of milliseconds, and in one for tests.
"""

from collections.abc import Callable

from benchmarks.zoo import convnext, decoder, efficientnet, mixer, resnet, ssm, unet, vit
from benchmarks.zoo.task import Task

TASKS: dict[str, Callable[[bool], Task]] = {
    "ResNet": resnet.task,
    "ConvNeXt": convnext.task,
    "EfficientNet": efficientnet.task,
    "ViT": vit.task,
    "Mixer": mixer.task,
    "decoder": decoder.task,
    "UNet": unet.task,
    "SSM": ssm.task,
}
"""Makers of the models by name; called with whether the size is that of a test."""
