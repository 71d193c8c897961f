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
from flax_customgrad.linear.einsum import Einsum as Einsum
from flax_customgrad.linear.embed import Embed as Embed
from flax_customgrad.linear.linear import Linear as Linear
from flax_customgrad.linear.linear_general import LinearGeneral as LinearGeneral
from flax_customgrad.linear.lora import LoRA as LoRA
from flax_customgrad.linear.lora import LoRALinear as LoRALinear
from flax_customgrad.model.convert import Rule as Rule
from flax_customgrad.model.convert import convert as convert
from flax_customgrad.model.convert import revert as revert
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
from flax_customgrad.residuals import Residual as Residual
from flax_customgrad.residuals import residual_bytes as residual_bytes
from flax_customgrad.residuals import residuals as residuals

__version__ = "0.1.0"
