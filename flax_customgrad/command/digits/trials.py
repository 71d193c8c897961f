"""A network for each estimator of the catalogue, which learns through its gradient."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import einops
import jax
from flax import nnx

from flax_customgrad.command.digits.blocks import (
    WIDTH,
    ActivationBlock,
    Block,
    MakeBlock,
    WeightBlock,
)
from flax_customgrad.command.digits.data import CLASSES, PIXELS
from flax_customgrad.command.digits.spikes import SpikingBlock, over_time
from flax_customgrad.estimators.categorical.gumbel_softmax import GumbelSoftmax
from flax_customgrad.estimators.categorical.reinmax import ReinMax
from flax_customgrad.estimators.categorical.top_k import TopKST
from flax_customgrad.estimators.codebook.fsq import FSQ
from flax_customgrad.estimators.codebook.lfq import LFQ
from flax_customgrad.estimators.codebook.residual_vq import ResidualVQ
from flax_customgrad.estimators.codebook.sim_vq import SimVQ
from flax_customgrad.estimators.codebook.usage import Quantized
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer
from flax_customgrad.estimators.rounding import heaviside, rounding, scaled_sign, sign
from flax_customgrad.estimators.rounding.ternary_step import SteTern
from flax_customgrad.estimators.sparse.n_m import n_m_sparsify
from flax_customgrad.estimators.sparse.n_m_linear import NMSparseLinear
from flax_customgrad.estimators.spiking import spike_surrogates as surrogate
from flax_customgrad.estimators.spiking.leaky import Leaky
from flax_customgrad.estimators.spiking.lif import LIF
from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear

_CODE_FEATURES = 4
"""How many features make one vector for a codebook."""

_CLASSES_PER_CHOICE = 8
"""How many features are the classes of one categorical choice."""

Chain = Callable[..., nnx.Module]
"""Makes one Module of layers and `rngs`, which calls the layers in order."""


def in_sequence(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """Calls layers one after another."""
    return nnx.Sequential(*layers)


class Trial(NamedTuple):
    """A network with an estimator in its two hidden blocks, and a layer that reads them.

    Attributes:
        block: makes a hidden block.
        chain: puts the layers one after another.
    """

    block: MakeBlock
    chain: Chain = in_sequence

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""
        return self.chain(
            self.block(PIXELS, WIDTH, rngs),
            self.block(WIDTH, WIDTH, rngs),
            nnx.Linear(WIDTH, CLASSES, rngs=rngs),
            rngs=rngs,
        )


def _random(step: Callable[[nnx.Rngs], Callable[..., Any]]) -> Trial:
    """A step function of features that draws from random streams."""

    def make(in_features: int, out_features: int, rngs: nnx.Rngs) -> Block:
        return ActivationBlock(step(rngs), nnx.Linear, in_features, out_features, rngs)

    return Trial(make)


def _step(
    function: Callable[..., Any],
    linear: Callable[..., nnx.Module] = nnx.Linear,
    chain: Chain = in_sequence,
) -> Trial:
    return Trial(functools.partial(ActivationBlock, function, linear), chain)


def _three_levels(
    function: Callable[[jax.Array], jax.Array],
    gradient: Literal["pass_through", "masked"] = "pass_through",
) -> Trial:
    """Rounding to -1, 0 and 1: of more levels, random features show the control too much."""
    return _step(lambda x: rounding.clip_ste(function(x), -1, 1, gradient=gradient))


def _weights(function: Callable[[jax.Array], jax.Array]) -> Trial:
    return Trial(functools.partial(WeightBlock, function))


class _GroupedChoice(nnx.Module):
    """A categorical choice in each group of features."""

    def __init__(self, layer: Callable[[jax.Array], jax.Array]):
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen = self.layer(einops.rearrange(x, "n (i k) -> n i k", k=_CLASSES_PER_CHOICE))
        return einops.rearrange(chosen, "n i k -> n (i k)")


class _GroupedCodebook(nnx.Module):
    """A codebook for the vectors that groups of features make; returns its loss too."""

    def __init__(self, layer: Callable[[jax.Array], Quantized]):
        self.layer = layer

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = self.layer(einops.rearrange(x, "n (i d) -> n i d", d=_CODE_FEATURES))
        return einops.rearrange(result.values, "n i d -> n (i d)"), result.loss


class _FeedbackConvBlock(nnx.Module):
    """A FeedbackConv of features that are taken for an image of 2 by 2 patches."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any):
        self.conv = FeedbackConv(in_features // 4, out_features // 4, (3, 3), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = einops.rearrange(x, "n (h a w b) -> n h w (a b)", h=2, w=2, a=4)
        return einops.rearrange(self.conv(patches), "n h w c -> n (h w c)")


def _choice(cls: Callable[..., Any], *args: Any) -> Trial:
    return _random(lambda rngs: _GroupedChoice(cls(*args, rngs=rngs)))


def _codebook(make: Callable[[nnx.Rngs], Any]) -> Trial:
    return _random(lambda rngs: _GroupedCodebook(make(rngs)))


def _vq(**kwargs: Any) -> Trial:
    return _codebook(lambda rngs: VectorQuantizer(32, _CODE_FEATURES, rngs=rngs, **kwargs))


def _spiking(cell: Callable[[int], nnx.RNNCellBase]) -> Trial:
    return Trial(functools.partial(SpikingBlock, cell), over_time)


def _by_direct_feedback(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    return DirectFeedback(*layers, features=(WIDTH, WIDTH, CLASSES), rngs=rngs)


TRIALS: dict[str, Trial] = {
    "round_ste": _three_levels(rounding.round_ste),
    "floor_ste": _three_levels(rounding.floor_ste),
    "ceil_ste": _three_levels(rounding.ceil_ste),
    "trunc_ste": _three_levels(rounding.trunc_ste),
    "clip_ste": _three_levels(rounding.round_ste, "masked"),
    "StochasticRound": _random(lambda rngs: rounding.StochasticRound(rngs=rngs)),
    "SteSign": _step(sign.SteSign()),
    "ApproxSign": _step(sign.ApproxSign()),
    "SwishSign": _step(sign.SwishSign()),
    "SteHeaviside": _step(heaviside.SteHeaviside()),
    "SteTern": _weights(SteTern("twn")),
    "MagnitudeAwareSign": _weights(scaled_sign.MagnitudeAwareSign()),
    "XNORSign": _weights(scaled_sign.XNORSign()),
    "GumbelSoftmax": _choice(GumbelSoftmax),
    "ReinMax": _choice(ReinMax),
    "TopKST": _choice(TopKST, 2),
    "n_m_sparsify": _weights(n_m_sparsify),
    "NMSparseLinear": _step(sign.SteSign(), NMSparseLinear),
    "VectorQuantizer": _vq(),
    "VectorQuantizer (rotation)": _vq(gradient="rotation"),
    "VectorQuantizer (ema)": _vq(learning="ema"),
    "ResidualVQ": _codebook(lambda rngs: ResidualVQ(2, 8, _CODE_FEATURES, rngs=rngs)),
    "FSQ": _codebook(lambda rngs: FSQ((5,) * _CODE_FEATURES)),
    "LFQ": _codebook(lambda rngs: LFQ(_CODE_FEATURES)),
    "SimVQ": _codebook(lambda rngs: SimVQ(32, _CODE_FEATURES, rngs=rngs)),
    "surrogate.fast_sigmoid": _step(functools.partial(surrogate.fast_sigmoid, slope=5.0)),
    "surrogate.atan": _step(surrogate.atan),
    "surrogate.sigmoid": _step(surrogate.sigmoid),
    "surrogate.triangular": _step(surrogate.triangular),
    "surrogate.boxcar": _step(surrogate.boxcar),
    "surrogate.piecewise_exponential": _step(surrogate.piecewise_exponential),
    "Leaky": _spiking(Leaky),
    "LIF": _spiking(LIF),
    "FeedbackLinear": _step(nnx.relu, FeedbackLinear),
    "FeedbackConv": _step(nnx.relu, _FeedbackConvBlock),
    "DirectFeedback": _step(nnx.tanh, chain=_by_direct_feedback),
}
