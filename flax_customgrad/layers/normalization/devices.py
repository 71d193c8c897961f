"""`Devices`: the devices that share statistics, and how they combine their own into one.

They exchange their own (count, square, factor, mean) in one collective, and combine them exactly; a
device without any element weighs nothing. That is where they are named, by `axis_name`. Where a
mesh splits the batch of a BatchNorm under `jax.jit`, the program is that of one device, and the
mean has to be known before it can be subtracted. This is a collective of its own, of one number for
each feature: with the backward's there are three, where nnx has two with the textbook's formulas,
its default, and four with `use_fast_variance=False`. The textbook's sums would lose the same digits
here, and no shift that all devices know without a collective, such as the running mean, is near the
mean when training starts.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.normalization.mean import Mean


@dataclass(frozen=True)
class Devices:
    """The devices that share statistics, along a named axis of shard_map, pmap or vmap.

    Attributes:
        axis_name: the axis, or several; None for each device on its own.
        groups: divides the axis into groups that share, as `jax.lax.psum` takes them; or None.
    """

    axis_name: Any = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def sum(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Sums arrays of one shape over the devices, in one collective."""
        if self.axis_name is None:
            return arrays
        stacked = lax.psum(jnp.stack(arrays), self.axis_name, axis_index_groups=self.groups)
        return tuple(stacked)

    def gather(self, a: jax.Array) -> jax.Array:
        """Stacks what each device holds along a new first axis; the same on all of them."""
        # A psum of slots rather than an all_gather, whose result shard_map takes to differ.
        index = lax.axis_index(self.axis_name)
        slots = lax.psum(1, self.axis_name, axis_index_groups=self.groups)
        if self.groups is not None:
            place = {device: i for group in self.groups for i, device in enumerate(group)}
            index = jnp.array([place[device] for device in sorted(place)])[index]
        mine = jnp.arange(slots) == index
        return self.sum(jnp.where(mine.reshape(-1, *[1] * a.ndim), a, 0))[0]

    def combine(
        self, count: jax.Array, mean: Mean | None, about: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, Mean | None, jax.Array, jax.Array]:
        """Combines the statistics of each device into those of all of them.

        The variance is the weighted mean of each device's own and the square of its distance from
        the mean of all.

        Args:
            count: how many elements a device has.
            mean: their mean; None where it is not taken out.
            about: their mean square about it, of numbers multiplied by a factor.
            factor: that factor.

        Returns:
            The same four, of all devices.
        """
        own = jnp.stack([jnp.broadcast_to(count, about.shape), about, factor, *(mean or ())])
        n, about, factors, *means = self.gather(own).swapaxes(0, 1)
        weight = n / jnp.maximum(n.sum(0), 1)
        # By the smallest factor nothing overflows, and what vanishes is nothing beside the others.
        factor = factors.min(0)
        about = about * (factor / factors) * (factor / factors)
        if means:
            m, c = means
            shift = (weight * m).sum(0)
            distance = (m - shift) + c
            mean = Mean(shift, (weight * distance).sum(0))
            about = about + ((distance - mean.correction) * factor) ** 2
        return n.sum(0), mean, (weight * about).sum(0), factor
