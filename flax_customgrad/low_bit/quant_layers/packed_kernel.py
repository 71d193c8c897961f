"""`PackedKernel`: the quantized weights of a layer, in as few bytes as their codes take."""

import math
from abc import abstractmethod
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.stacked import unstack
from flax_customgrad.low_bit.quant_layers.latent_weights import Measured, latent_weights
from flax_customgrad.low_bit.quantizers.codes import decode_packed, stored_width, unpacked_integers
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.dtypes import in_dtype
from flax_customgrad.numerics.packing import pack_bits, unpack_bits


class Packed(nnx.Variable):
    """Codes of weights, or what decodes them, such as a scale; no optimizer moves them."""


@runtime_checkable
class Packable(Protocol):
    """A layer whose weights `pack` turns into codes."""

    def pack_weights(self) -> bool:
        """Puts codes in the place of the weights, in place; False where it quantizes none."""
        ...

    def unpack_weights(self) -> bool:
        """Puts a Param in the place of the codes again, in place; False where there are none."""
        ...


class PackedWeights(nnx.Module):
    """Takes the place of a layer's kernel; `kernel[...]` gives its values.

    Attributes:
        codes: the codes of the kernel, with the metadata of its Variable.
        kind: the type of its Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    codes: nnx.Variable[jax.Array]
    kind: type[nnx.Variable]
    shape: tuple[int, ...]
    dtype: Any
    bits: int

    @property
    def saved_nbytes(self) -> int:
        """How many bytes it saves: those of its values, less those that it holds."""
        held = sum(a.nbytes for a in jax.tree.leaves(nnx.state(self, Packed, graph=True)))
        weights = math.prod((*self.stack_axes, *self.shape))
        return weights * jnp.dtype(self.dtype).itemsize - held

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which the weights of layers are stacked; () for one layer."""
        return self.codes.shape[: self.codes.ndim - len(self.shape)]

    def to_variable(self) -> nnx.Variable[jax.Array]:
        """A Variable with weights to train on, of the type and with the metadata of the first."""
        axes, metadata = self.stack_axes, self.codes.get_metadata()
        values = [one.latent() for one in unstack(self, axes).values()]
        return self.kind.from_metadata(jnp.stack(values).reshape(*axes, *self.shape), metadata)

    @abstractmethod
    def latent(self) -> jax.Array:
        """Weights that are packed into these codes again."""

    def share(self, other: "PackedWeights") -> None:
        """Holds the Variables of another, which was packed of the same Param in the same way.

        Args:
            other: the packed weights of another layer.
        """
        mine, others = (nnx.split(weights, graph=True) for weights in (self, other))
        (graphdef, state), (other_graphdef, other_state) = mine, others
        if graphdef != other_graphdef or not all(isinstance(v, Packed) for v in _variables(self)):
            return
        if all(map(_are_equal, jax.tree.leaves(state), jax.tree.leaves(other_state))):
            for name, value in vars(other).items():
                if isinstance(value, Packed | nnx.List):
                    setattr(self, name, value)

    @abstractmethod
    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""


class PackedKernel(PackedWeights):
    """A quantized kernel as codes, in the place of a layer's kernel.

    The values, `kernel[...]`, are those of the quantizer to the bit.

    Attributes:
        codes: uint8, codes of at most 4 bits several to a byte along the last axis; uint16 for more
            than 8 bits.
        parameters: what decodes them, such as a scale.
        quantizer: what quantized the kernel, for `unpack`.
        kind: the type of its Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    def __init__(self, kernel: jax.Array, quantizer: Quantizer, variable: nnx.Variable):
        """Quantizes and packs.

        Args:
            kernel: array of any shape, float.
            quantizer: the quantizer of the kernel.
            variable: the Variable of the kernel, whose type and metadata are kept.
        """
        values, codes, parameters, scheme = quantizer.quantize(kernel)
        self.bits = stored_width(scheme, codes)
        self.codes = Packed.from_metadata(pack_bits(codes, self.bits), variable.get_metadata())
        self.kind = type(variable)
        self.parameters = nnx.List([Packed(p) for p in parameters])
        self.quantizer = quantizer
        self.shape = values.shape
        self.dtype = values.dtype
        self._scheme = scheme

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        parameters = tuple(p[...] for p in self.parameters)
        return decode_packed(self.codes[...], parameters, self._scheme, self.bits, like)[key]

    def latent(self) -> jax.Array:
        """Weights that the quantizer turns into these codes again."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        parameters = tuple(p[...] for p in self.parameters)
        operands = unpacked_integers(self.codes[...], parameters, self._scheme, self.bits, like)
        w = in_dtype(self._scheme.latent(*operands), self.dtype)
        if is_traced(w):
            return w

        def measure(w: jax.Array) -> Measured:
            made = self.quantizer.quantize(w)
            return Measured(made.codes, made.parameters)

        codes = self.codes[...]
        unpacked = codes if self.bits >= 8 else unpack_bits(codes, self.bits, self.shape[-1])
        granularity = getattr(self._scheme, "granularity", None)
        blocks = (
            {} if granularity is None else {"spread": partial(granularity.spread, shape=self.shape)}
        )
        return latent_weights(w, Measured(unpacked, parameters), measure, **blocks)


def _variables(module: nnx.Module) -> list[nnx.Variable]:
    return [v for _, v in nnx.iter_graph(module, graph=True) if isinstance(v, nnx.Variable)]


def _are_equal(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays are equal, as far as that is known."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return is_traced(a) or is_traced(b) or bool(jnp.array_equal(a, b))
