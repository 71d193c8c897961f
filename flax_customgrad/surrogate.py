"""Spikes with surrogate gradients: the gradient of a step, put in the place of zero."""

from flax_customgrad.estimators.spiking.spike_surrogates import (
    atan,
    boxcar,
    fast_sigmoid,
    piecewise_exponential,
    sigmoid,
    triangular,
)
from flax_customgrad.registry.public import publish

__all__ = ["atan", "boxcar", "fast_sigmoid", "piecewise_exponential", "sigmoid", "triangular"]

publish(globals(), __all__)
