"""What the wrappers that normalize the weights of a layer share."""

from typing import Any

from flax_customgrad.normalization.axes import Axes, canonical


def per_feature(ndim: int, feature_axes: Any) -> Axes:
    """The axes of a weight that is normalized for each of its features.

    Args:
        ndim: the number of axes of the weight.
        feature_axes: an int or several; negative ones count from the end.

    Raises:
        ValueError: the weight has no such axis.
    """
    features = canonical(ndim, feature_axes)
    return Axes(tuple(i for i in range(ndim) if i not in features), features)
