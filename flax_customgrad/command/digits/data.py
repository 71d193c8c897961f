"""The data: scikit-learn's handwritten digits, 1797 images of 8 by 8 pixels in ten classes."""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
"""How many digits there are."""

PIXELS = 64
"""How many pixels an image has."""


class Batch(NamedTuple):
    """Images and what they show.

    Attributes:
        images: float32 of shape (n, 8, 8, 1), from 0 to 1.
        labels: int32 of shape (n,), from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


def load(seed: int) -> tuple[Batch, Batch]:
    """Splits the images: three quarters of each class to train on, a quarter to test on."""
    pixels, classes = load_digits(return_X_y=True)
    images = (np.reshape(pixels, (-1, 8, 8, 1)) / 16).astype(np.float32)
    labels = np.asarray(classes, np.int32)
    rows = np.arange(len(labels))
    chosen, held_out = train_test_split(rows, test_size=0.25, stratify=labels, random_state=seed)
    return Batch(images[chosen], labels[chosen]), Batch(images[held_out], labels[held_out])


def load_seeds(seeds: int) -> tuple[Batch, Batch]:
    """The images to train and to test on of each seed, along a first axis."""
    splits = [load(seed) for seed in range(seeds)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *splits)


def flatten(images: ArrayLike) -> jax.Array:
    """Images of shape (n, 8, 8, 1) as rows of pixels, of shape (n, 64)."""
    return einops.rearrange(jnp.asarray(images), "n h w 1 -> n (h w)")
