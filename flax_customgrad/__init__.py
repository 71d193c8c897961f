"""flax-customgrad: Flax NNX layers that each carry a hand-written backward pass."""

from flax_customgrad.autodiff import use_autodiff
from flax_customgrad.contract import CustomVJP, custom_vjp
from flax_customgrad.cotangents import CotangentError
