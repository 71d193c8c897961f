"""`PackedWeights`: codes in the place of the weights of a layer, in as few bytes as they take."""

import math
from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.stacked import Index, for_each, stack_axes, unstack


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


class PackableKernel:
    """Mixed into a layer that always computes with a rounded or pruned kernel.

    It comes after the layer among the bases: only then can a layer of nnx become one of these.
    """

    __slots__ = ()
    kernel: Any

    def pack_weights(self) -> bool:
        """Puts the codes of the kernel in its place; see `flax_customgrad.pack`.

        Returns:
            Whether it was not packed before.
        """
        if self.is_packed:
            return False
        self.kernel = for_each(self._pack_one, stack_axes(self))
        return True

    def unpack_weights(self) -> bool:
        """Puts a Param in the place of the codes; see `flax_customgrad.unpack`.

        Returns:
            Whether there are codes.
        """
        if not self.is_packed:
            return False
        self.kernel = self.kernel.to_variable()
        return True

    @property
    def is_packed(self) -> bool:
        """Whether codes are in the place of the kernel."""
        return isinstance(self.kernel, PackedWeights)

    def _pack_one(self, index: Index) -> "PackedWeights":
        """The codes of a kernel: of one in a stack, by its index."""
        raise NotImplementedError


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


def _variables(module: nnx.Module) -> list[nnx.Variable]:
    return [v for _, v in nnx.iter_graph(module, graph=True) if isinstance(v, nnx.Variable)]


def _are_equal(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays are equal, as far as that is known."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return is_traced(a) or is_traced(b) or bool(jnp.array_equal(a, b))
