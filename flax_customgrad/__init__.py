"""flax-customgrad: Flax NNX layers that each carry a hand-written backward pass."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from flax_customgrad import surrogate
from flax_customgrad.contract.autodiff import use_autodiff
from flax_customgrad.contract.backward_state import (
    BackwardState,
    BackwardStateError,
    backward_state,
    load_backward_state,
    reset_backward_state,
)
from flax_customgrad.contract.cotangents import CotangentError
from flax_customgrad.contract.custom_vjp import CustomVJP, custom_vjp
from flax_customgrad.contract.residuals import Residual, residual_bytes, residuals
from flax_customgrad.estimators.categorical.gumbel_softmax import GumbelSoftmax, gumbel_softmax
from flax_customgrad.estimators.categorical.reinmax import ReinMax, reinmax
from flax_customgrad.estimators.categorical.top_k import TopKST, top_k_st
from flax_customgrad.estimators.codebook.fsq import FSQ
from flax_customgrad.estimators.codebook.lfq import LFQ
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.estimators.codebook.residual_vq import ResidualVQ
from flax_customgrad.estimators.codebook.rotation_trick import rotation_trick
from flax_customgrad.estimators.codebook.sim_vq import SimVQ
from flax_customgrad.estimators.codebook.straight_through_estimator import (
    straight_through_estimator,
)
from flax_customgrad.estimators.codebook.usage import Quantized, codebook_perplexity
from flax_customgrad.estimators.codebook.vector_quantizer import Codebook, VectorQuantizer
from flax_customgrad.estimators.rounding.heaviside import SteHeaviside
from flax_customgrad.estimators.rounding.rounding import (
    StochasticRound,
    ceil_ste,
    clip_ste,
    floor_ste,
    round_ste,
    stochastic_round,
    trunc_ste,
)
from flax_customgrad.estimators.rounding.scaled_sign import MagnitudeAwareSign, XNORSign
from flax_customgrad.estimators.rounding.sign import ApproxSign, SteSign, SwishSign
from flax_customgrad.estimators.rounding.ternary_step import SteTern
from flax_customgrad.estimators.sparse.n_m import n_m_sparsify
from flax_customgrad.estimators.sparse.n_m_kernel import NMKernel
from flax_customgrad.estimators.sparse.n_m_linear import NMSparseLinear
from flax_customgrad.estimators.spiking.leaky import Leaky
from flax_customgrad.estimators.spiking.lif import LIF
from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear
from flax_customgrad.gradients.feedback.feedback_variable import Feedback
from flax_customgrad.gradients.few_bit.few_bit import few_bit_gelu, few_bit_silu
from flax_customgrad.gradients.shaping.clip import GradientClip, gradient_clip
from flax_customgrad.gradients.shaping.reversal import GradientReversal, gradient_reversal
from flax_customgrad.gradients.shaping.scale import GradientScale, gradient_scale
from flax_customgrad.gradients.shaping.stop import StopGradient, stop_gradient
from flax_customgrad.layers.activation.exponential import celu, elu, selu
from flax_customgrad.layers.activation.gated import geglu, reglu, swiglu
from flax_customgrad.layers.activation.gated_linear import GeGLU, ReGLU, SwiGLU
from flax_customgrad.layers.activation.glu import glu
from flax_customgrad.layers.activation.log_softmax import log_softmax
from flax_customgrad.layers.activation.logsumexp import logsumexp
from flax_customgrad.layers.activation.piecewise import (
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    leaky_relu,
    relu,
    relu6,
)
from flax_customgrad.layers.activation.prelu import PReLU
from flax_customgrad.layers.activation.sigmoidal import sigmoid, tanh
from flax_customgrad.layers.activation.smooth import (
    gelu,
    log_sigmoid,
    mish,
    silu,
    soft_sign,
    softplus,
    squareplus,
    swish,
)
from flax_customgrad.layers.activation.softmax import softmax
from flax_customgrad.layers.attention.dot_product_attention import dot_product_attention
from flax_customgrad.layers.attention.dot_product_attention_with_rope import (
    dot_product_attention_with_rope,
)
from flax_customgrad.layers.attention.multi_head_attention import MultiHeadAttention
from flax_customgrad.layers.conv.choose_lowering import use_lowering
from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose
from flax_customgrad.layers.dropout.dropout import Dropout, dropout
from flax_customgrad.layers.invertible.invertible_batch_norm_act import InvertibleBatchNormAct
from flax_customgrad.layers.invertible.reversible import Reversible
from flax_customgrad.layers.linear.einsum import Einsum
from flax_customgrad.layers.linear.embed import Embed
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.linear.linear_general import LinearGeneral
from flax_customgrad.layers.linear.lora import LoRA, LoRALinear
from flax_customgrad.layers.losses.ctc_loss import ctc_loss
from flax_customgrad.layers.losses.linear_cross_entropy import linear_cross_entropy
from flax_customgrad.layers.losses.sigmoid_binary_cross_entropy import sigmoid_binary_cross_entropy
from flax_customgrad.layers.losses.softmax_cross_entropy import (
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from flax_customgrad.layers.normalization.batch_norm import BatchNorm
from flax_customgrad.layers.normalization.group_norm import GroupNorm
from flax_customgrad.layers.normalization.instance_norm import InstanceNorm
from flax_customgrad.layers.normalization.layer_norm import LayerNorm
from flax_customgrad.layers.normalization.rms_norm import RMSNorm
from flax_customgrad.layers.normalization.standardize import standardize
from flax_customgrad.layers.packed_weights import Packed
from flax_customgrad.layers.pooling.avg_pool import avg_pool
from flax_customgrad.layers.pooling.max_pool import max_pool, min_pool
from flax_customgrad.layers.pooling.pool import pool
from flax_customgrad.layers.recurrent.bidirectional import Bidirectional
from flax_customgrad.layers.recurrent.gru import GRUCell
from flax_customgrad.layers.recurrent.linear_recurrence import linear_recurrence
from flax_customgrad.layers.recurrent.lru import LRU
from flax_customgrad.layers.recurrent.lstm import LSTMCell, OptimizedLSTMCell
from flax_customgrad.layers.recurrent.min_gru import MinGRU
from flax_customgrad.layers.recurrent.rnn import RNN
from flax_customgrad.layers.recurrent.simple import SimpleCell
from flax_customgrad.layers.weight_norms.spectral_norm import SpectralNorm
from flax_customgrad.layers.weight_norms.weight_norm import WeightNorm
from flax_customgrad.layers.weight_norms.weight_standardization import WeightStandardization
from flax_customgrad.low_bit.fp8.fp8_einsum import Fp8Einsum
from flax_customgrad.low_bit.fp8.fp8_kernel import Fp8Kernel
from flax_customgrad.low_bit.fp8.fp8_linear import Fp8Linear
from flax_customgrad.low_bit.fp8.fp8_scaling import DelayedScaling, begin_step
from flax_customgrad.low_bit.frozen.frozen_variable import Frozen
from flax_customgrad.low_bit.frozen.int4_linear import Int4Linear
from flax_customgrad.low_bit.frozen.nf4_linear import NF4Linear
from flax_customgrad.low_bit.frozen.qlora_linear import QLoRALinear
from flax_customgrad.low_bit.int8.int8_conv import Int8Conv
from flax_customgrad.low_bit.int8.int8_kernel import Int8Kernel
from flax_customgrad.low_bit.int8.int8_linear import Int8Linear
from flax_customgrad.low_bit.microscaling.block_kernel import BlockKernel
from flax_customgrad.low_bit.microscaling.mx_linear import MXLinear
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4Linear
from flax_customgrad.low_bit.quant_layers.binary_layers import BinaryConv, BinaryLinear
from flax_customgrad.low_bit.quant_layers.bit_linear import BitLinear
from flax_customgrad.low_bit.quant_layers.packed_kernel import PackedKernel
from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv
from flax_customgrad.low_bit.quant_layers.quant_conv_transpose import QuantConvTranspose
from flax_customgrad.low_bit.quant_layers.quant_einsum import QuantEinsum
from flax_customgrad.low_bit.quant_layers.quant_embed import QuantEmbed
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quant_layers.quant_linear_general import QuantLinearGeneral
from flax_customgrad.low_bit.quant_layers.ternary_layers import TernaryConv, TernaryLinear
from flax_customgrad.low_bit.quantizers.binary import BinaryActivation, BinaryWeight
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.low_bit.quantizers.dorefa import DoReFaActivation, DoReFaWeight
from flax_customgrad.low_bit.quantizers.ewgs import EWGS
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant, QuantStat
from flax_customgrad.low_bit.quantizers.gradient_quant import DoReFaGradient, GradientQuant
from flax_customgrad.low_bit.quantizers.lsq import LSQ
from flax_customgrad.low_bit.quantizers.lsq_plus import LSQPlus
from flax_customgrad.low_bit.quantizers.pact import PACT
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.low_bit.quantizers.ternary_weights import TWN, AbsMean
from flax_customgrad.low_bit.quantizers.tqt import TQT
from flax_customgrad.low_bit.quantizers.ttq import TTQ
from flax_customgrad.model.audit import audit
from flax_customgrad.model.audit_report import Audit, AuditRow
from flax_customgrad.model.calibrate import calibrate
from flax_customgrad.model.conversion import conversion
from flax_customgrad.model.conversion_report import Conversion, ConversionRow
from flax_customgrad.model.convert import convert, revert
from flax_customgrad.model.fold_batch_norm import fold_batch_norm
from flax_customgrad.model.functions import functions
from flax_customgrad.model.pack import pack, unpack
from flax_customgrad.model.rules import Rule, Where
from flax_customgrad.model.size import Size, SizeReport, size_report
from flax_customgrad.registry import moved
from flax_customgrad.registry.public import publish

if TYPE_CHECKING:
    from flax_customgrad import catalogue, testing

__version__ = "0.1.0"

__all__ = [
    "EWGS",
    "FSQ",
    "LFQ",
    "LIF",
    "LRU",
    "LSQ",
    "PACT",
    "RNN",
    "TQT",
    "TTQ",
    "TWN",
    "AbsMean",
    "ApproxSign",
    "Audit",
    "AuditRow",
    "BackwardState",
    "BackwardStateError",
    "BatchNorm",
    "Bidirectional",
    "BinaryActivation",
    "BinaryConv",
    "BinaryLinear",
    "BinaryWeight",
    "BitLinear",
    "BlockKernel",
    "Codebook",
    "Codes",
    "Conv",
    "ConvTranspose",
    "Conversion",
    "ConversionRow",
    "CotangentError",
    "CustomVJP",
    "DelayedScaling",
    "DirectFeedback",
    "DoReFaActivation",
    "DoReFaGradient",
    "DoReFaWeight",
    "Dropout",
    "Einsum",
    "Embed",
    "FakeQuant",
    "Feedback",
    "FeedbackConv",
    "FeedbackLinear",
    "Fp8Einsum",
    "Fp8Kernel",
    "Fp8Linear",
    "Frozen",
    "GRUCell",
    "GeGLU",
    "GradientClip",
    "GradientQuant",
    "GradientReversal",
    "GradientScale",
    "GroupNorm",
    "GumbelSoftmax",
    "InstanceNorm",
    "Int4Linear",
    "Int8Conv",
    "Int8Kernel",
    "Int8Linear",
    "InvertibleBatchNormAct",
    "LSQPlus",
    "LSTMCell",
    "LayerNorm",
    "Leaky",
    "Linear",
    "LinearGeneral",
    "LoRA",
    "LoRALinear",
    "MXLinear",
    "MagnitudeAwareSign",
    "MinGRU",
    "MultiHeadAttention",
    "NF4Linear",
    "NMKernel",
    "NMSparseLinear",
    "NVFP4Linear",
    "OptimizedLSTMCell",
    "PReLU",
    "Packed",
    "PackedKernel",
    "QLoRALinear",
    "QuantConv",
    "QuantConvTranspose",
    "QuantEinsum",
    "QuantEmbed",
    "QuantLinear",
    "QuantLinearGeneral",
    "QuantStat",
    "Quantized",
    "Quantizer",
    "RMSNorm",
    "ReGLU",
    "ReinMax",
    "Residual",
    "ResidualVQ",
    "Reversible",
    "Rule",
    "Scheme",
    "SimVQ",
    "SimpleCell",
    "Size",
    "SizeReport",
    "SpectralNorm",
    "SteHeaviside",
    "SteSign",
    "SteTern",
    "StochasticRound",
    "StopGradient",
    "SwiGLU",
    "SwishSign",
    "TernaryConv",
    "TernaryLinear",
    "TopKST",
    "VectorQuantizer",
    "WeightNorm",
    "WeightStandardization",
    "Where",
    "XNORSign",
    "audit",
    "avg_pool",
    "backward_state",
    "begin_step",
    "calibrate",
    "catalogue",
    "ceil_ste",
    "celu",
    "clip_ste",
    "codebook_perplexity",
    "conversion",
    "convert",
    "ctc_loss",
    "custom_vjp",
    "dot_product_attention",
    "dot_product_attention_with_rope",
    "dropout",
    "elu",
    "few_bit_gelu",
    "few_bit_silu",
    "floor_ste",
    "fold_batch_norm",
    "functions",
    "geglu",
    "gelu",
    "glu",
    "gradient_clip",
    "gradient_reversal",
    "gradient_scale",
    "gumbel_softmax",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "linear_cross_entropy",
    "linear_recurrence",
    "load_backward_state",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "max_pool",
    "min_pool",
    "mish",
    "n_m_sparsify",
    "nearest_code",
    "pack",
    "pool",
    "reglu",
    "reinmax",
    "relu",
    "relu6",
    "reset_backward_state",
    "residual_bytes",
    "residuals",
    "revert",
    "rotation_trick",
    "round_ste",
    "selu",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "silu",
    "size_report",
    "soft_sign",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softplus",
    "squareplus",
    "standardize",
    "stochastic_round",
    "stop_gradient",
    "straight_through_estimator",
    "surrogate",
    "swiglu",
    "swish",
    "tanh",
    "testing",
    "top_k_st",
    "trunc_ste",
    "unpack",
    "use_autodiff",
    "use_lowering",
]

publish(globals(), __all__)
moved.install(sys.modules[__name__])


def __getattr__(name: str) -> Any:
    # What a training script does not need loads when it is used.
    if name in ("catalogue", "testing"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
