"""flax-customgrad: Flax NNX layers that each carry a hand-written backward pass."""

from flax_customgrad import catalogue as catalogue
from flax_customgrad import testing as testing
from flax_customgrad.autodiff import use_autodiff as use_autodiff
from flax_customgrad.contract import CustomVJP as CustomVJP
from flax_customgrad.contract import custom_vjp as custom_vjp
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
from flax_customgrad.residuals import Residual as Residual
from flax_customgrad.residuals import residual_bytes as residual_bytes
from flax_customgrad.residuals import residuals as residuals

__version__ = "0.1.0"
