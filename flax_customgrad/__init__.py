"""flax-customgrad: Flax NNX layers that each carry a hand-written backward pass."""

from flax_customgrad import catalogue as catalogue
from flax_customgrad import testing as testing
from flax_customgrad.contract.autodiff import use_autodiff as use_autodiff
from flax_customgrad.contract.backward_state import BackwardState as BackwardState
from flax_customgrad.contract.backward_state import BackwardStateError as BackwardStateError
from flax_customgrad.contract.backward_state import backward_state as backward_state
from flax_customgrad.contract.backward_state import load_backward_state as load_backward_state
from flax_customgrad.contract.backward_state import reset_backward_state as reset_backward_state
from flax_customgrad.contract.cotangents import CotangentError as CotangentError
from flax_customgrad.contract.custom_vjp import CustomVJP as CustomVJP
from flax_customgrad.contract.custom_vjp import custom_vjp as custom_vjp
from flax_customgrad.contract.residuals import Residual as Residual
from flax_customgrad.contract.residuals import residual_bytes as residual_bytes
from flax_customgrad.contract.residuals import residuals as residuals
from flax_customgrad.estimators.categorical.gumbel_softmax import GumbelSoftmax as GumbelSoftmax
from flax_customgrad.estimators.categorical.gumbel_softmax import gumbel_softmax as gumbel_softmax
from flax_customgrad.estimators.categorical.reinmax import ReinMax as ReinMax
from flax_customgrad.estimators.categorical.reinmax import reinmax as reinmax
from flax_customgrad.estimators.categorical.top_k import TopKST as TopKST
from flax_customgrad.estimators.categorical.top_k import top_k_st as top_k_st
from flax_customgrad.estimators.codebook.fsq import FSQ as FSQ
from flax_customgrad.estimators.codebook.lfq import LFQ as LFQ
from flax_customgrad.estimators.codebook.residual_vq import ResidualVQ as ResidualVQ
from flax_customgrad.estimators.codebook.rotation_trick import rotation_trick as rotation_trick
from flax_customgrad.estimators.codebook.sim_vq import SimVQ as SimVQ
from flax_customgrad.estimators.codebook.straight_through_estimator import (
    straight_through_estimator as straight_through_estimator,
)
from flax_customgrad.estimators.codebook.vector_quantizer import VectorQuantizer as VectorQuantizer
from flax_customgrad.estimators.rounding.heaviside import SteHeaviside as SteHeaviside
from flax_customgrad.estimators.rounding.rounding import StochasticRound as StochasticRound
from flax_customgrad.estimators.rounding.rounding import ceil_ste as ceil_ste
from flax_customgrad.estimators.rounding.rounding import clip_ste as clip_ste
from flax_customgrad.estimators.rounding.rounding import floor_ste as floor_ste
from flax_customgrad.estimators.rounding.rounding import round_ste as round_ste
from flax_customgrad.estimators.rounding.rounding import stochastic_round as stochastic_round
from flax_customgrad.estimators.rounding.rounding import trunc_ste as trunc_ste
from flax_customgrad.estimators.rounding.scaled_sign import MagnitudeAwareSign as MagnitudeAwareSign
from flax_customgrad.estimators.rounding.scaled_sign import XNORSign as XNORSign
from flax_customgrad.estimators.rounding.sign import ApproxSign as ApproxSign
from flax_customgrad.estimators.rounding.sign import SteSign as SteSign
from flax_customgrad.estimators.rounding.sign import SwishSign as SwishSign
from flax_customgrad.estimators.rounding.ternary import SteTern as SteTern
from flax_customgrad.estimators.sparse.n_m import n_m_sparsify as n_m_sparsify
from flax_customgrad.estimators.sparse.n_m_linear import NMSparseLinear as NMSparseLinear
from flax_customgrad.estimators.spiking import surrogate
from flax_customgrad.estimators.spiking.leaky import Leaky as Leaky
from flax_customgrad.estimators.spiking.lif import LIF as LIF
from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback as DirectFeedback
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv as FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear as FeedbackLinear
from flax_customgrad.gradients.feedback.feedback_variable import Feedback as Feedback
from flax_customgrad.gradients.shaping.clip import GradientClip as GradientClip
from flax_customgrad.gradients.shaping.clip import gradient_clip as gradient_clip
from flax_customgrad.gradients.shaping.reversal import GradientReversal as GradientReversal
from flax_customgrad.gradients.shaping.reversal import gradient_reversal as gradient_reversal
from flax_customgrad.gradients.shaping.scale import GradientScale as GradientScale
from flax_customgrad.gradients.shaping.scale import gradient_scale as gradient_scale
from flax_customgrad.gradients.shaping.stop import StopGradient as StopGradient
from flax_customgrad.gradients.shaping.stop import stop_gradient as stop_gradient
from flax_customgrad.layers.activation.exponential import celu as celu
from flax_customgrad.layers.activation.exponential import elu as elu
from flax_customgrad.layers.activation.exponential import selu as selu
from flax_customgrad.layers.activation.gated import geglu as geglu
from flax_customgrad.layers.activation.gated import glu as glu
from flax_customgrad.layers.activation.gated import reglu as reglu
from flax_customgrad.layers.activation.gated import swiglu as swiglu
from flax_customgrad.layers.activation.gated_linear import GeGLU as GeGLU
from flax_customgrad.layers.activation.gated_linear import ReGLU as ReGLU
from flax_customgrad.layers.activation.gated_linear import SwiGLU as SwiGLU
from flax_customgrad.layers.activation.piecewise import hard_sigmoid as hard_sigmoid
from flax_customgrad.layers.activation.piecewise import hard_silu as hard_silu
from flax_customgrad.layers.activation.piecewise import hard_swish as hard_swish
from flax_customgrad.layers.activation.piecewise import hard_tanh as hard_tanh
from flax_customgrad.layers.activation.piecewise import leaky_relu as leaky_relu
from flax_customgrad.layers.activation.piecewise import relu as relu
from flax_customgrad.layers.activation.piecewise import relu6 as relu6
from flax_customgrad.layers.activation.prelu import PReLU as PReLU
from flax_customgrad.layers.activation.sigmoidal import sigmoid as sigmoid
from flax_customgrad.layers.activation.sigmoidal import tanh as tanh
from flax_customgrad.layers.activation.smooth import gelu as gelu
from flax_customgrad.layers.activation.smooth import log_sigmoid as log_sigmoid
from flax_customgrad.layers.activation.smooth import mish as mish
from flax_customgrad.layers.activation.smooth import silu as silu
from flax_customgrad.layers.activation.smooth import soft_sign as soft_sign
from flax_customgrad.layers.activation.smooth import softplus as softplus
from flax_customgrad.layers.activation.smooth import squareplus as squareplus
from flax_customgrad.layers.activation.smooth import swish as swish
from flax_customgrad.layers.activation.softmax import log_softmax as log_softmax
from flax_customgrad.layers.activation.softmax import logsumexp as logsumexp
from flax_customgrad.layers.activation.softmax import softmax as softmax
from flax_customgrad.layers.conv.conv import Conv as Conv
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose as ConvTranspose
from flax_customgrad.layers.conv.lowering import use_lowering as use_lowering
from flax_customgrad.layers.linear.einsum import Einsum as Einsum
from flax_customgrad.layers.linear.embed import Embed as Embed
from flax_customgrad.layers.linear.linear import Linear as Linear
from flax_customgrad.layers.linear.linear_general import LinearGeneral as LinearGeneral
from flax_customgrad.layers.linear.lora import LoRA as LoRA
from flax_customgrad.layers.linear.lora import LoRALinear as LoRALinear
from flax_customgrad.layers.normalization.batch_norm import BatchNorm as BatchNorm
from flax_customgrad.layers.normalization.group_norm import GroupNorm as GroupNorm
from flax_customgrad.layers.normalization.instance_norm import InstanceNorm as InstanceNorm
from flax_customgrad.layers.normalization.layer_norm import LayerNorm as LayerNorm
from flax_customgrad.layers.normalization.rms_norm import RMSNorm as RMSNorm
from flax_customgrad.layers.normalization.standardize import standardize as standardize
from flax_customgrad.layers.pooling.pool_functions import avg_pool as avg_pool
from flax_customgrad.layers.pooling.pool_functions import max_pool as max_pool
from flax_customgrad.layers.pooling.pool_functions import min_pool as min_pool
from flax_customgrad.layers.pooling.pool_functions import pool as pool
from flax_customgrad.layers.weight_norms.spectral_norm import SpectralNorm as SpectralNorm
from flax_customgrad.layers.weight_norms.weight_norm import WeightNorm as WeightNorm
from flax_customgrad.layers.weight_norms.weight_standardization import (
    WeightStandardization as WeightStandardization,
)
from flax_customgrad.low_bit.fp8.delayed_scaling import DelayedScaling as DelayedScaling
from flax_customgrad.low_bit.fp8.delayed_scaling import begin_step as begin_step
from flax_customgrad.low_bit.fp8.fp8_einsum import Fp8Einsum as Fp8Einsum
from flax_customgrad.low_bit.fp8.fp8_linear import Fp8Linear as Fp8Linear
from flax_customgrad.low_bit.frozen.frozen_variable import Frozen as Frozen
from flax_customgrad.low_bit.frozen.int4_linear import Int4Linear as Int4Linear
from flax_customgrad.low_bit.frozen.nf4_linear import NF4Linear as NF4Linear
from flax_customgrad.low_bit.frozen.qlora_linear import QLoRALinear as QLoRALinear
from flax_customgrad.low_bit.int8.int8_conv import Int8Conv as Int8Conv
from flax_customgrad.low_bit.int8.int8_kernel import Int8Kernel as Int8Kernel
from flax_customgrad.low_bit.int8.int8_linear import Int8Linear as Int8Linear
from flax_customgrad.low_bit.microscaling.mx_linear import MXLinear as MXLinear
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4Linear as NVFP4Linear
from flax_customgrad.low_bit.quant_layers.binary_layers import BinaryConv as BinaryConv
from flax_customgrad.low_bit.quant_layers.binary_layers import BinaryLinear as BinaryLinear
from flax_customgrad.low_bit.quant_layers.bit_linear import BitLinear as BitLinear
from flax_customgrad.low_bit.quant_layers.packed_kernel import Packed as Packed
from flax_customgrad.low_bit.quant_layers.packed_kernel import PackedKernel as PackedKernel
from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv as QuantConv
from flax_customgrad.low_bit.quant_layers.quant_conv_transpose import (
    QuantConvTranspose as QuantConvTranspose,
)
from flax_customgrad.low_bit.quant_layers.quant_einsum import QuantEinsum as QuantEinsum
from flax_customgrad.low_bit.quant_layers.quant_embed import QuantEmbed as QuantEmbed
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear as QuantLinear
from flax_customgrad.low_bit.quant_layers.quant_linear_general import (
    QuantLinearGeneral as QuantLinearGeneral,
)
from flax_customgrad.low_bit.quant_layers.ternary_layers import TernaryConv as TernaryConv
from flax_customgrad.low_bit.quant_layers.ternary_layers import TernaryLinear as TernaryLinear
from flax_customgrad.low_bit.quantizers.binary import BinaryActivation as BinaryActivation
from flax_customgrad.low_bit.quantizers.binary import BinaryWeight as BinaryWeight
from flax_customgrad.low_bit.quantizers.dorefa import DoReFaActivation as DoReFaActivation
from flax_customgrad.low_bit.quantizers.dorefa import DoReFaWeight as DoReFaWeight
from flax_customgrad.low_bit.quantizers.ewgs import EWGS as EWGS
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant as FakeQuant
from flax_customgrad.low_bit.quantizers.fake_quant import QuantStat as QuantStat
from flax_customgrad.low_bit.quantizers.gradient_quant import DoReFaGradient as DoReFaGradient
from flax_customgrad.low_bit.quantizers.gradient_quant import GradientQuant as GradientQuant
from flax_customgrad.low_bit.quantizers.lsq import LSQ as LSQ
from flax_customgrad.low_bit.quantizers.lsq_plus import LSQPlus as LSQPlus
from flax_customgrad.low_bit.quantizers.pact import PACT as PACT
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer as Quantizer
from flax_customgrad.low_bit.quantizers.ternary import TWN as TWN
from flax_customgrad.low_bit.quantizers.ternary import AbsMean as AbsMean
from flax_customgrad.low_bit.quantizers.tqt import TQT as TQT
from flax_customgrad.low_bit.quantizers.ttq import TTQ as TTQ
from flax_customgrad.model.calibrate import calibrate as calibrate
from flax_customgrad.model.convert import Rule as Rule
from flax_customgrad.model.convert import convert as convert
from flax_customgrad.model.convert import revert as revert
from flax_customgrad.model.pack import pack as pack
from flax_customgrad.model.pack import unpack as unpack
from flax_customgrad.model.size import Size as Size
from flax_customgrad.model.size import SizeReport as SizeReport
from flax_customgrad.model.size import size_report as size_report

__version__ = "0.1.0"
