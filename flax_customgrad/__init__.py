"""flax-customgrad: Flax NNX layers that each carry a hand-written backward pass."""

from flax_customgrad import catalogue as catalogue
from flax_customgrad import testing as testing
from flax_customgrad.activation.exponential import celu as celu
from flax_customgrad.activation.exponential import elu as elu
from flax_customgrad.activation.exponential import selu as selu
from flax_customgrad.activation.gated import geglu as geglu
from flax_customgrad.activation.gated import glu as glu
from flax_customgrad.activation.gated import reglu as reglu
from flax_customgrad.activation.gated import swiglu as swiglu
from flax_customgrad.activation.gated_linear import GeGLU as GeGLU
from flax_customgrad.activation.gated_linear import ReGLU as ReGLU
from flax_customgrad.activation.gated_linear import SwiGLU as SwiGLU
from flax_customgrad.activation.piecewise import hard_sigmoid as hard_sigmoid
from flax_customgrad.activation.piecewise import hard_silu as hard_silu
from flax_customgrad.activation.piecewise import hard_swish as hard_swish
from flax_customgrad.activation.piecewise import hard_tanh as hard_tanh
from flax_customgrad.activation.piecewise import leaky_relu as leaky_relu
from flax_customgrad.activation.piecewise import relu as relu
from flax_customgrad.activation.piecewise import relu6 as relu6
from flax_customgrad.activation.prelu import PReLU as PReLU
from flax_customgrad.activation.sigmoidal import sigmoid as sigmoid
from flax_customgrad.activation.sigmoidal import tanh as tanh
from flax_customgrad.activation.smooth import gelu as gelu
from flax_customgrad.activation.smooth import log_sigmoid as log_sigmoid
from flax_customgrad.activation.smooth import mish as mish
from flax_customgrad.activation.smooth import silu as silu
from flax_customgrad.activation.smooth import soft_sign as soft_sign
from flax_customgrad.activation.smooth import softplus as softplus
from flax_customgrad.activation.smooth import squareplus as squareplus
from flax_customgrad.activation.smooth import swish as swish
from flax_customgrad.activation.softmax import log_softmax as log_softmax
from flax_customgrad.activation.softmax import logsumexp as logsumexp
from flax_customgrad.activation.softmax import softmax as softmax
from flax_customgrad.autodiff import use_autodiff as use_autodiff
from flax_customgrad.backward_state import BackwardState as BackwardState
from flax_customgrad.backward_state import BackwardStateError as BackwardStateError
from flax_customgrad.backward_state import backward_state as backward_state
from flax_customgrad.backward_state import load_backward_state as load_backward_state
from flax_customgrad.backward_state import reset_backward_state as reset_backward_state
from flax_customgrad.categorical.gumbel_softmax import GumbelSoftmax as GumbelSoftmax
from flax_customgrad.categorical.gumbel_softmax import gumbel_softmax as gumbel_softmax
from flax_customgrad.categorical.reinmax import ReinMax as ReinMax
from flax_customgrad.categorical.reinmax import reinmax as reinmax
from flax_customgrad.categorical.top_k import TopKST as TopKST
from flax_customgrad.categorical.top_k import top_k_st as top_k_st
from flax_customgrad.codebook.fsq import FSQ as FSQ
from flax_customgrad.codebook.lfq import LFQ as LFQ
from flax_customgrad.codebook.residual_vq import ResidualVQ as ResidualVQ
from flax_customgrad.codebook.rotation import rotation_trick as rotation_trick
from flax_customgrad.codebook.sim_vq import SimVQ as SimVQ
from flax_customgrad.codebook.straight_through import (
    straight_through_estimator as straight_through_estimator,
)
from flax_customgrad.codebook.vector_quantizer import VectorQuantizer as VectorQuantizer
from flax_customgrad.contract import CustomVJP as CustomVJP
from flax_customgrad.contract import custom_vjp as custom_vjp
from flax_customgrad.conv.conv import Conv as Conv
from flax_customgrad.conv.conv_transpose import ConvTranspose as ConvTranspose
from flax_customgrad.conv.lowering import use_lowering as use_lowering
from flax_customgrad.conv.pooling import avg_pool as avg_pool
from flax_customgrad.conv.pooling import max_pool as max_pool
from flax_customgrad.conv.pooling import min_pool as min_pool
from flax_customgrad.conv.pooling import pool as pool
from flax_customgrad.cotangents import CotangentError as CotangentError
from flax_customgrad.feedback.direct_feedback import DirectFeedback as DirectFeedback
from flax_customgrad.feedback.feedback_conv import FeedbackConv as FeedbackConv
from flax_customgrad.feedback.feedback_linear import FeedbackLinear as FeedbackLinear
from flax_customgrad.feedback.variable import Feedback as Feedback
from flax_customgrad.fp8.delayed import DelayedScaling as DelayedScaling
from flax_customgrad.fp8.delayed import begin_step as begin_step
from flax_customgrad.fp8.fp8_einsum import Fp8Einsum as Fp8Einsum
from flax_customgrad.fp8.fp8_linear import Fp8Linear as Fp8Linear
from flax_customgrad.frozen.int4_linear import Int4Linear as Int4Linear
from flax_customgrad.frozen.nf4_linear import NF4Linear as NF4Linear
from flax_customgrad.frozen.qlora_linear import QLoRALinear as QLoRALinear
from flax_customgrad.frozen.variable import Frozen as Frozen
from flax_customgrad.int8.int8_conv import Int8Conv as Int8Conv
from flax_customgrad.int8.int8_linear import Int8Linear as Int8Linear
from flax_customgrad.linear.einsum import Einsum as Einsum
from flax_customgrad.linear.embed import Embed as Embed
from flax_customgrad.linear.linear import Linear as Linear
from flax_customgrad.linear.linear_general import LinearGeneral as LinearGeneral
from flax_customgrad.linear.lora import LoRA as LoRA
from flax_customgrad.linear.lora import LoRALinear as LoRALinear
from flax_customgrad.microscaling.mx_linear import MXLinear as MXLinear
from flax_customgrad.microscaling.nvfp4_linear import NVFP4Linear as NVFP4Linear
from flax_customgrad.model.calibrate import calibrate as calibrate
from flax_customgrad.model.convert import Rule as Rule
from flax_customgrad.model.convert import convert as convert
from flax_customgrad.model.convert import revert as revert
from flax_customgrad.model.pack import pack as pack
from flax_customgrad.model.pack import unpack as unpack
from flax_customgrad.model.size import Size as Size
from flax_customgrad.model.size import SizeReport as SizeReport
from flax_customgrad.model.size import size_report as size_report
from flax_customgrad.normalization.batch_norm import BatchNorm as BatchNorm
from flax_customgrad.normalization.group_norm import GroupNorm as GroupNorm
from flax_customgrad.normalization.instance_norm import InstanceNorm as InstanceNorm
from flax_customgrad.normalization.layer_norm import LayerNorm as LayerNorm
from flax_customgrad.normalization.rms_norm import RMSNorm as RMSNorm
from flax_customgrad.normalization.spectral_norm import SpectralNorm as SpectralNorm
from flax_customgrad.normalization.standardize import standardize as standardize
from flax_customgrad.normalization.weight_norm import WeightNorm as WeightNorm
from flax_customgrad.normalization.weight_standardization import (
    WeightStandardization as WeightStandardization,
)
from flax_customgrad.quantized.binary import BinaryActivation as BinaryActivation
from flax_customgrad.quantized.binary import BinaryWeight as BinaryWeight
from flax_customgrad.quantized.binary_layers import BinaryConv as BinaryConv
from flax_customgrad.quantized.binary_layers import BinaryLinear as BinaryLinear
from flax_customgrad.quantized.bit_linear import BitLinear as BitLinear
from flax_customgrad.quantized.fake_quant import FakeQuant as FakeQuant
from flax_customgrad.quantized.fake_quant import QuantStat as QuantStat
from flax_customgrad.quantized.lsq import LSQ as LSQ
from flax_customgrad.quantized.packed_kernel import Packed as Packed
from flax_customgrad.quantized.packed_kernel import PackedKernel as PackedKernel
from flax_customgrad.quantized.quant_conv import QuantConv as QuantConv
from flax_customgrad.quantized.quant_conv_transpose import (
    QuantConvTranspose as QuantConvTranspose,
)
from flax_customgrad.quantized.quant_einsum import QuantEinsum as QuantEinsum
from flax_customgrad.quantized.quant_embed import QuantEmbed as QuantEmbed
from flax_customgrad.quantized.quant_linear import QuantLinear as QuantLinear
from flax_customgrad.quantized.quant_linear_general import (
    QuantLinearGeneral as QuantLinearGeneral,
)
from flax_customgrad.quantized.quantizer import Quantizer as Quantizer
from flax_customgrad.quantized.ternary import TWN as TWN
from flax_customgrad.quantized.ternary import AbsMean as AbsMean
from flax_customgrad.quantized.ternary_layers import TernaryConv as TernaryConv
from flax_customgrad.quantized.ternary_layers import TernaryLinear as TernaryLinear
from flax_customgrad.quantized.ttq import TTQ as TTQ
from flax_customgrad.residuals import Residual as Residual
from flax_customgrad.residuals import residual_bytes as residual_bytes
from flax_customgrad.residuals import residuals as residuals
from flax_customgrad.shaping.clip import GradientClip as GradientClip
from flax_customgrad.shaping.clip import gradient_clip as gradient_clip
from flax_customgrad.shaping.reversal import GradientReversal as GradientReversal
from flax_customgrad.shaping.reversal import gradient_reversal as gradient_reversal
from flax_customgrad.shaping.scale import GradientScale as GradientScale
from flax_customgrad.shaping.scale import gradient_scale as gradient_scale
from flax_customgrad.shaping.stop import StopGradient as StopGradient
from flax_customgrad.shaping.stop import stop_gradient as stop_gradient
from flax_customgrad.sparse.n_m import n_m_sparsify as n_m_sparsify
from flax_customgrad.sparse.n_m_linear import NMSparseLinear as NMSparseLinear
from flax_customgrad.spiking import surrogate as surrogate
from flax_customgrad.spiking.leaky import Leaky as Leaky
from flax_customgrad.spiking.lif import LIF as LIF
from flax_customgrad.straight_through.heaviside import SteHeaviside as SteHeaviside
from flax_customgrad.straight_through.rounding import StochasticRound as StochasticRound
from flax_customgrad.straight_through.rounding import ceil_ste as ceil_ste
from flax_customgrad.straight_through.rounding import clip_ste as clip_ste
from flax_customgrad.straight_through.rounding import floor_ste as floor_ste
from flax_customgrad.straight_through.rounding import round_ste as round_ste
from flax_customgrad.straight_through.rounding import stochastic_round as stochastic_round
from flax_customgrad.straight_through.rounding import trunc_ste as trunc_ste
from flax_customgrad.straight_through.scaled_sign import MagnitudeAwareSign as MagnitudeAwareSign
from flax_customgrad.straight_through.scaled_sign import XNORSign as XNORSign
from flax_customgrad.straight_through.sign import ApproxSign as ApproxSign
from flax_customgrad.straight_through.sign import SteSign as SteSign
from flax_customgrad.straight_through.sign import SwishSign as SwishSign
from flax_customgrad.straight_through.ternary import SteTern as SteTern

__version__ = "0.1.0"
