"""`pack` and `unpack`: from a model that quantizes its weights to one that holds codes, and back.

Each layer that quantizes or prunes its kernel in every call gets `PackedWeights` in its place, such
as a `PackedKernel` or an `Int8Kernel`: codes, those of at most 4 bits several to a byte, and their
scales. Everything else stays, so the outputs equal those of the model in eval mode to the bit, and
`nnx.split`, `nnx.jit` and checkpoints go on working.
"""

from typing import Any, TypeVar

from flax import nnx

from flax_customgrad.layers.packed_weights import Packable, PackedWeights
from flax_customgrad.model.tree import layers, set_mode

M = TypeVar("M")


def pack(model: M) -> M:
    """Turns a quantized model into one for inference, which holds codes instead of weights.

    Of an `Fp8Linear` with delayed scaling the scales of the step to come are kept. An
    `NMSparseLinear` keeps the weights that it uses, and a bit for each that says which they are.

    Args:
        model: a Module, or a tree of Modules, with layers such as `QuantLinear`, `Int8Linear`,
            `Fp8Linear`, `MXLinear` and `NMSparseLinear`. It is not changed.

    Returns:
        A copy in eval mode whose quantized weights are packed. Its outputs are the same, its packed
        weights have no gradient, and `nnx.state` holds their codes and scales.

    Raises:
        ValueError: no layer of the model quantizes or prunes its weights, or those of an
            `NMSparseLinear` have NaN, for which there is no place.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantLinear(64, 32, weight=fcg.FakeQuant(4, axis=-1), rngs=nnx.Rngs(0))
        >>> packed = fcg.pack(layer)
        >>> packed.kernel.codes.shape, packed.kernel.codes.dtype
        ((64, 16), dtype('uint8'))
        >>> x = jnp.ones((2, 64))
        >>> bool((packed(x) == layer(x)).all())
        True
    """
    packed = nnx.clone(model, graph=True)
    set_mode(packed, "eval")
    shared: dict[int, PackedWeights] = {}
    changed = False
    for layer in _packable(packed):
        variables = {name: id(value) for name, value in vars(layer).items()}
        changed |= layer.pack_weights()
        for name, weights in vars(layer).items():
            if isinstance(weights, PackedWeights) and id(weights) != variables[name]:
                first = shared.setdefault(variables[name], weights)
                if first is not weights:
                    weights.share(first)
    if not changed:
        raise ValueError(
            "pack: no layer of the model has a quantizer for its weights, or is an Int8Linear, "
            "Int8Conv, Fp8Linear, Fp8Einsum, MXLinear, NVFP4Linear or NMSparseLinear. Build one as "
            "flax_customgrad.QuantLinear(..., weight=flax_customgrad.FakeQuant(8)), or turn layers "
            "into one with flax_customgrad.convert(model, rules=...)"
        )
    return packed


def unpack(model: M) -> M:
    """Turns a packed model back into one that trains.

    Args:
        model: what `pack` returned. It is not changed.

    Returns:
        A copy in train mode, with the Variables that the weights had. The weights from before
        quantization, or those that were pruned, are lost; these go through their quantizers again,
        which make the same codes and scales of them, in half precision nearly the same scales.

    Raises:
        ValueError: no layer of the model is packed.
    """
    unpacked = nnx.clone(model, graph=True)
    shared: dict[int, nnx.Variable] = {}
    changed = False
    for layer in _packable(unpacked):
        packed = {n: w.codes for n, w in vars(layer).items() if isinstance(w, PackedWeights)}
        changed |= layer.unpack_weights()
        for name, codes in packed.items():
            setattr(layer, name, shared.setdefault(id(codes), getattr(layer, name)))
    if not changed:
        raise ValueError("unpack: no layer of the model is packed")
    set_mode(unpacked, "train")
    return unpacked


def _packable(model: Any) -> list[Packable]:
    return [layer for _, layer in layers(model) if isinstance(layer, Packable)]
