"""A network for each estimator of the catalogue, in which learning depends on its gradient."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import einops
import jax
from flax import nnx

from flax_customgrad.command.digits.probe import (
    CLASSES,
    PIXELS,
    WIDTH,
    Activation,
    Block,
    Make,
    Weights,
)
from flax_customgrad.command.digits.spikes import Spiking, over_time
from flax_customgrad.estimators.categorical.gumbel_softmax import GumbelSoftmax
from flax_customgrad.estimators.categorical.reinmax import ReinMax
from flax_customgrad.estimators.categorical.top_k import TopKST
from flax_customgrad.estimators.codebook.fsq import FSQ
from flax_customgrad.estimators.codebook.lfq import LFQ
from flax_customgrad.estimators.codebook.residual_vq import ResidualVQ
from flax_customgrad.estimators.codebook.sim_vq import SimVQ
from flax_customgrad.estimators.codebook.usage import Quantized
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer
from flax_customgrad.estimators.rounding import heaviside, rounding, scaled_sign, sign, ternary
from flax_customgrad.estimators.sparse.n_m import n_m_sparsify
from flax_customgrad.estimators.sparse.n_m_linear import NMSparseLinear
from flax_customgrad.estimators.spiking import spike_surrogates as surrogate
from flax_customgrad.estimators.spiking.leaky import Leaky
from flax_customgrad.estimators.spiking.lif import LIF
from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear

_SIZE = 4
"""How many features are one vector to a codebook."""

_CHOICES = 8
"""How many features are the classes of one categorical choice."""

Linear = Callable[..., nnx.Module]


Chain = Callable[..., nnx.Module]
"""Makes one Module of layers, and `rngs`, which calls them one after another."""


def in_sequence(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """The plain chain."""
    return nnx.Sequential(*layers)


class Trial(NamedTuple):
    """A network to try an estimator in: two hidden blocks with it, and a layer that reads them.

    Attributes:
        block: makes a hidden block.
        chain: puts the layers one after another.
    """

    block: Make
    chain: Chain = in_sequence

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""
        return self.chain(
            self.block(PIXELS, WIDTH, rngs),
            self.block(WIDTH, WIDTH, rngs),
            nnx.Linear(WIDTH, CLASSES, rngs=rngs),
            rngs=rngs,
        )


def _drawing(step: Callable[[nnx.Rngs], Callable[..., Any]]) -> Trial:
    """A step of features that is made from the streams that it draws from."""

    def make(in_features: int, out_features: int, rngs: nnx.Rngs) -> Block:
        return Activation(step(rngs), nnx.Linear, in_features, out_features, rngs)

    return Trial(make)


def _step(
    function: Callable[..., Any], linear: Linear = nnx.Linear, chain: Chain = in_sequence
) -> Trial:
    return Trial(functools.partial(Activation, function, linear), chain)


def _three_levels(
    function: Callable[[jax.Array], jax.Array],
    gradient: Literal["pass_through", "masked"] = "pass_through",
) -> Trial:
    """Rounding to -1, 0 and 1: of more levels, random features show the control too much."""
    return _step(lambda x: rounding.clip_ste(function(x), -1, 1, gradient=gradient))


def _weights(function: Callable[[jax.Array], jax.Array]) -> Trial:
    return Trial(functools.partial(Weights, function))


class _Choices(nnx.Module):
    """A categorical choice among each few features."""

    def __init__(self, layer: Callable[[jax.Array], jax.Array]):
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen = self.layer(einops.rearrange(x, "n (i k) -> n i k", k=_CHOICES))
        return einops.rearrange(chosen, "n i k -> n (i k)")


class _Codes(nnx.Module):
    """A codebook for each few features; returns its loss too."""

    def __init__(self, layer: Callable[[jax.Array], Quantized]):
        self.layer = layer

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = self.layer(einops.rearrange(x, "n (i d) -> n i d", d=_SIZE))
        return einops.rearrange(found.values, "n i d -> n (i d)"), found.loss


class _Convolved(nnx.Module):
    """Features as an image of 2 by 2 patches, and back."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any):
        self.conv = FeedbackConv(in_features // 4, out_features // 4, (3, 3), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = einops.rearrange(x, "n (h a w b) -> n h w (a b)", h=2, w=2, a=4)
        return einops.rearrange(self.conv(patches), "n h w c -> n (h w c)")


def _chosen(cls: Callable[..., Any], *args: Any) -> Trial:
    return _drawing(lambda rngs: _Choices(cls(*args, rngs=rngs)))


def _coded(make: Callable[[nnx.Rngs], Any]) -> Trial:
    return _drawing(lambda rngs: _Codes(make(rngs)))


def _vq(**kwargs: Any) -> Trial:
    return _coded(lambda rngs: VectorQuantizer(32, _SIZE, rngs=rngs, **kwargs))


def _neurons(cell: Callable[[int], nnx.RNNCellBase]) -> Trial:
    return Trial(functools.partial(Spiking, cell), over_time)


def _by_direct_feedback(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    return DirectFeedback(*layers, features=(WIDTH, WIDTH, CLASSES), rngs=rngs)


TRIALS: dict[str, Trial] = {
    "round_ste": _three_levels(rounding.round_ste),
    "floor_ste": _three_levels(rounding.floor_ste),
    "ceil_ste": _three_levels(rounding.ceil_ste),
    "trunc_ste": _three_levels(rounding.trunc_ste),
    "clip_ste": _three_levels(rounding.round_ste, "masked"),
    "StochasticRound": _drawing(lambda rngs: rounding.StochasticRound(rngs=rngs)),
    "SteSign": _step(sign.SteSign()),
    "ApproxSign": _step(sign.ApproxSign()),
    "SwishSign": _step(sign.SwishSign()),
    "SteHeaviside": _step(heaviside.SteHeaviside()),
    "SteTern": _weights(ternary.SteTern("twn")),
    "MagnitudeAwareSign": _weights(scaled_sign.MagnitudeAwareSign()),
    "XNORSign": _weights(scaled_sign.XNORSign()),
    "GumbelSoftmax": _chosen(GumbelSoftmax),
    "ReinMax": _chosen(ReinMax),
    "TopKST": _chosen(TopKST, 2),
    "n_m_sparsify": _weights(n_m_sparsify),
    "NMSparseLinear": _step(sign.SteSign(), NMSparseLinear),
    "VectorQuantizer": _vq(),
    "VectorQuantizer (rotation)": _vq(gradient="rotation"),
    "VectorQuantizer (ema)": _vq(learning="ema"),
    "ResidualVQ": _coded(lambda rngs: ResidualVQ(2, 8, _SIZE, rngs=rngs)),
    "FSQ": _coded(lambda rngs: FSQ((5,) * _SIZE)),
    "LFQ": _coded(lambda rngs: LFQ(_SIZE)),
    "SimVQ": _coded(lambda rngs: SimVQ(32, _SIZE, rngs=rngs)),
    "surrogate.fast_sigmoid": _step(functools.partial(surrogate.fast_sigmoid, slope=5.0)),
    "surrogate.atan": _step(surrogate.atan),
    "surrogate.sigmoid": _step(surrogate.sigmoid),
    "surrogate.triangular": _step(surrogate.triangular),
    "surrogate.boxcar": _step(surrogate.boxcar),
    "surrogate.piecewise_exponential": _step(surrogate.piecewise_exponential),
    "Leaky": _neurons(Leaky),
    "LIF": _neurons(LIF),
    "FeedbackLinear": _step(nnx.relu, FeedbackLinear),
    "FeedbackConv": _step(nnx.relu, _Convolved),
    "DirectFeedback": _step(nnx.tanh, chain=_by_direct_feedback),
}
