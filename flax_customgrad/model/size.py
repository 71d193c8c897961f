"""`size_report`: the bytes of each layer of a model, packed or not."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from flax_customgrad.model.tree import layers, path_order


@dataclass(frozen=True)
class Size:
    """The bytes of one layer, without those of the layers that it holds.

    Attributes:
        path: the path of the layer in the model; empty for the model itself.
        layer: the name of its class.
        bits: the bits of a code of packed weights; None where nothing is packed.
        nbytes: the bytes of its Variables.
        unpacked_nbytes: the same, with packed weights in the dtype that they are decoded to.
    """

    path: str
    layer: str
    bits: int | None
    nbytes: int
    unpacked_nbytes: int


@dataclass(frozen=True)
class SizeReport:
    """The bytes of the layers of a model; it prints as a table.

    Attributes:
        sizes: the size of each layer that holds Variables, sorted by path.
    """

    sizes: tuple[Size, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole model."""
        return sum(size.nbytes for size in self.sizes)

    @property
    def unpacked_nbytes(self) -> int:
        """The bytes of the whole model if nothing were packed."""
        return sum(size.unpacked_nbytes for size in self.sizes)

    def __str__(self) -> str:
        """A table with a row for each layer, and the total."""
        rows = [("path", "layer", "bits", "bytes", "unpacked")]
        for s in self.sizes:
            bits = "" if s.bits is None else str(s.bits)
            path = s.path or "(the model)"
            rows.append((path, s.layer, bits, f"{s.nbytes:,}", f"{s.unpacked_nbytes:,}"))
        rows.append(("total", "", "", f"{self.nbytes:,}", f"{self.unpacked_nbytes:,}"))
        path, layer, bits, nbytes, unpacked = (
            max(map(len, column)) for column in zip(*rows, strict=True)
        )
        return "\n".join(
            f"{a:<{path}}  {b:<{layer}}  {c:>{bits}}  {d:>{nbytes}}  {e:>{unpacked}}"
            for a, b, c, d, e in rows
        )


def size_report(model: Any) -> SizeReport:
    """Counts the bytes of the layers of a model.

    What several layers share is counted once, with the first of them.

    Args:
        model: a Module, or a tree of Modules.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: the model holds no Module.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantLinear(64, 32, weight=fcg.FakeQuant(4), rngs=nnx.Rngs(0))
        >>> print(fcg.size_report(fcg.pack(layer)))
        path         layer         bits  bytes  unpacked
        (the model)  QuantLinear           128       128
        kernel       PackedKernel     4  1,028     8,192
        total                            1,156     8,320
    """
    sizes = []
    counted: set[int] = set()
    for (path, *_), layer in layers(model):
        held = [] if isinstance(layer, nnx.List) else _own_variables(layer)
        new = [variable for variable in held if id(variable) not in counted]
        counted.update(map(id, new))
        nbytes = sum(a.nbytes for variable in new for a in jax.tree.leaves(variable[...]))
        if nbytes:
            # Packed weights know how many bytes they save.
            saved = getattr(layer, "saved_nbytes", None)
            bits = None if saved is None else getattr(layer, "bits", None)
            sizes.append(Size(path, type(layer).__name__, bits, nbytes, nbytes + (saved or 0)))
    return SizeReport(tuple(sorted(sizes, key=lambda size: path_order(size.path))))


def _own_variables(layer: nnx.Module) -> list[nnx.Variable]:
    """The Variables that a layer holds itself, also those in an nnx.List."""
    held = vars(layer).values()
    flat = [v for value in held for v in (value if isinstance(value, nnx.List) else (value,))]
    return [v for v in flat if isinstance(v, nnx.Variable)]
