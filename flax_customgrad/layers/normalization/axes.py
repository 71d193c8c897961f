"""`NormAxes`: the axes that share statistics, and the axes along which scale and bias vary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from einops import rearrange
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.numerics.argument_checks import integers
from flax_customgrad.numerics.sizes import is_known
from flax_customgrad.numerics.unfused import unfused


@dataclass(frozen=True)
class NormAxes:
    """Which elements share statistics, and which share a scale and a bias.

    A sum over the reduced axes is taken in two steps: first over those without features, which
    leaves what the gradients of scale and bias need too, then over the features. A statistic has
    the axes that are left.

    Axes are counted from the end, so that further leading axes change nothing.

    Attributes:
        reduced: the axes that share statistics, negative and in ascending order.
        features: the axes along which scale and bias vary, negative and in ascending order.
        groups: into how many groups of features the last axis is divided (`GroupNorm`), each with
            statistics of its own; None where the axis is reduced or kept whole.
    """

    reduced: tuple[int, ...]
    features: tuple[int, ...]
    groups: int | None = None

    @classmethod
    def of(cls, ndim: int, reduced: Any, features: Any, groups: int | None = None) -> "NormAxes":
        """Takes axes as a user gives them: an int or several, negative ones from the end.

        Args:
            ndim: the number of axes of the input.
            reduced: the axes that share statistics.
            features: the axes along which scale and bias vary.
            groups: the number of groups of the last axis, or None.

        Raises:
            ValueError: the input has no such axis.
        """
        return cls(_from_the_end(ndim, reduced), _from_the_end(ndim, features), groups)

    @classmethod
    def per_feature(cls, ndim: int, features: Any) -> "NormAxes":
        """All axes but those of the features share statistics, as in `BatchNorm`.

        Args:
            ndim: the number of axes of the input.
            features: the other axes, as a user gives them.

        Raises:
            ValueError: the input has no such axis.
        """
        features = _from_the_end(ndim, features)
        return cls(tuple(i for i in range(-ndim, 0) if i not in features), features)

    @property
    def plain(self) -> tuple[int, ...]:
        """The reduced axes that carry no features."""
        return tuple(i for i in self.reduced if i not in self.features)

    def sum_plain(self, a: jax.Array) -> jax.Array:
        """The sum over the reduced axes that carry no features, which are dropped."""
        if not self.plain:
            return a
        # Barrier: two sums are made of this one. XLA would merge each with it and read `a` twice.
        return lax.optimization_barrier(lax.reduce_sum(a, [i + a.ndim for i in self.plain]))

    def sum_features(self, partial: jax.Array) -> jax.Array:
        """The second step: sums what `sum_plain` left over the features, one number a statistic."""
        if self.groups is not None:
            grouped = rearrange(partial, "... (g k) -> ... g k", g=self.groups)
            return lax.reduce_sum(grouped, [partial.ndim])
        both = [i for i in self.reduced if i in self.features]
        return lax.reduce_sum(partial, self._left_of_plain(both, partial)) if both else partial

    def sum(self, a: jax.Array) -> jax.Array:
        """The sum over all elements that share a statistic; the reduced axes are dropped."""
        if self.groups is None:
            return lax.reduce_sum(a, [i + a.ndim for i in self.reduced])
        return self.sum_features(self.sum_plain(a))

    def of_features(self, statistics: Any, shape: tuple[int, ...]) -> Any:
        """Statistics of groups as those of their features: what `spread` takes.

        Args:
            statistics: a tree of arrays, each as `sum` yields it.
            shape: that of the input.

        Returns:
            The same tree; as it came where no groups are.
        """
        if self.groups is None:
            return statistics
        # A pass over the input that looks up the group of each element takes up to six times as
        # long.
        of_features = _stored if self._is_much_smaller(shape) else _of_features
        return of_features(statistics, shape[-1] // self.groups)

    def spread(self, statistics: Any, shape: tuple[int, ...]) -> Any:
        """Statistics of features, each element of an input with that of its own.

        Args:
            statistics: a tree of arrays, each as `of_features` yields it.
            shape: that of the input.

        Returns:
            The same tree, of arrays of this shape.
        """
        left = _others(len(shape), self.plain if self.groups is not None else self.reduced)
        return jax.tree.map(lambda a: lax.broadcast_in_dim(a, shape, left), statistics)

    def _is_much_smaller(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of a number for each feature takes next to nothing beside the input."""
        count = math.prod(shape[i] for i in self.plain)
        return is_known(count) and count >= 16

    def count(self, shape: tuple[int, ...]) -> int:
        """How many elements of an input of this shape share a statistic."""
        return math.prod(shape[i] for i in self.reduced) // (self.groups or 1)

    def statistic_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a statistic of an input of this shape, as `sum` yields it."""
        if self.groups is not None:
            return (*(shape[i] for i in _others(len(shape), self.plain)[:-1]), self.groups)
        return tuple(shape[i] for i in _others(len(shape), self.reduced))

    def along(self, parameter: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A scale or bias, each element of an input with that of its feature.

        Returns:
            Array of the input's shape.

        Raises:
            ValueError: the feature axes have another number of elements.
        """
        sizes = [shape[i] for i in self.features]
        if math.prod(sizes) != parameter.size:
            raise ValueError(
                f"scale and bias have {parameter.size} elements, but the feature axes "
                f"{self.features} of an input of shape {shape} have {math.prod(sizes)}: check "
                "num_features and feature_axes"
            )
        places = [i + len(shape) for i in self.features]
        return lax.broadcast_in_dim(parameter.reshape(sizes), shape, places)

    def scaled_and_shifted(self, y: jax.Array, params: Parameters) -> jax.Array:
        """A normalized input times the scale plus the bias, those of the two that there are.

        Args:
            y: array of any shape, float, in the dtype to compute in.
            params: `scale` and `bias`, float, of as many elements as the feature axes have.
        """
        if "scale" in params:
            y = lax.mul(y, self.along(params["scale"], y.shape).astype(y.dtype))
        if "bias" in params:
            y = lax.add(y, self.along(params["bias"], y.shape).astype(y.dtype))
        return y

    def along_partial(self, parameter: jax.Array, partial: jax.Array) -> jax.Array:
        """A scale or bias as `along` has it, for what `sum_plain` left of an input."""
        places = self._left_of_plain(self.features, partial)
        sizes = [partial.shape[i] for i in places]
        return lax.broadcast_in_dim(parameter.reshape(sizes), partial.shape, places)

    def parameter_sum(self, partial: jax.Array, like: jax.Array) -> jax.Array:
        """The gradient of a scale or bias: the sum over all axes but its own.

        Args:
            partial: what `sum_plain` left.
            like: the parameter, for the shape.
        """
        own = self._left_of_plain(self.features, partial)
        rest = [i for i in range(partial.ndim) if i not in own]
        return (lax.reduce_sum(partial, rest) if rest else partial).reshape(like.shape)

    def _left_of_plain(self, axes: Sequence[int], partial: jax.Array) -> list[int]:
        """Where axes of an input are in what `sum_plain` left of it, counted from 0."""
        left = _others(partial.ndim + len(self.plain), self.plain)
        return [left.index(i + partial.ndim + len(self.plain)) for i in axes]


def _of_features(statistics: Any, size: int) -> Any:
    def of_features(a: jax.Array) -> jax.Array:
        repeated = lax.broadcast_in_dim(a, (*a.shape, size), range(a.ndim))
        return repeated.reshape(*a.shape[:-1], a.shape[-1] * size)

    return jax.tree.map(of_features, statistics)


_stored = unfused(static_argnums=1)(_of_features)


def _others(ndim: int, axes: Sequence[int]) -> list[int]:
    """The axes but some, which are counted from the end; counted from 0."""
    return [i for i in range(ndim) if i - ndim not in axes]


def _from_the_end(ndim: int, axes: Any) -> tuple[int, ...]:
    return tuple(axis - ndim for axis in canonical(ndim, axes))


def canonical(ndim: int, axes: Any) -> tuple[int, ...]:
    """Sorts axes, counted from 0 and each once.

    Args:
        ndim: the number of axes there are.
        axes: an int, or several; negative ones count from the end.

    Raises:
        ValueError: there is no such axis.
    """
    axes = integers(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} does not exist: the input has {ndim} axes")
    return tuple(sorted({axis % ndim for axis in axes}))
