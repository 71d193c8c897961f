"""`pack`: from a model that was trained with quantized weights to one that holds only their codes.

Each layer that quantizes its kernel in every call gets a `PackedKernel` or `Int8Kernel` for it:
integer codes, of at most 4 bits several to a byte, and their scales. All else stays, so the outputs
are those of the model in eval mode to the bit, and what NNX does to a model (split, jit, a
checkpoint) works on.
"""

from typing import Any, TypeVar

from flax import nnx

from flax_customgrad.low_bit.quant_layers.packed_kernel import Packable
from flax_customgrad.model.convert import layers

M = TypeVar("M")


def pack(model: M) -> M:
    """Makes the inference model of a quantized one: codes in the place of weights.

    Args:
        model: a Module, or a tree of them, with layers such as `QuantLinear` and `Int8Linear`. It
            stays as it is.

    Returns:
        A copy in eval mode whose quantized weights are packed. Its outputs are the same, it has no
        gradient for them, and `nnx.state` has their codes and scales.

    Raises:
        ValueError: no layer quantizes its weights.

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
    packed = nnx.clone(model)
    _switch(packed, "eval")
    found = [layer.pack_weights() for layer in _packable(packed)]
    if not any(found):
        raise ValueError(
            "pack: no layer of the model has a quantizer for its weights, or is an Int8Linear or "
            "Int8Conv. Build one with "
            "flax_customgrad.QuantLinear(..., weight=flax_customgrad.FakeQuant(8)), or turn layers "
            "into one with flax_customgrad.convert(model, rules=...)"
        )
    return packed


def unpack(model: M) -> M:
    """Makes a model that trains of a packed one.

    Args:
        model: what `pack` returned. It stays as it is.

    Returns:
        A copy in train mode, with Params that have the values of the codes and go through their
        quantizers again. What the weights were before they were quantized is lost.

    Raises:
        ValueError: no layer is packed.
    """
    unpacked = nnx.clone(model)
    found = [layer.unpack_weights() for layer in _packable(unpacked)]
    if not any(found):
        raise ValueError("unpack: no layer of the model is packed")
    _switch(unpacked, "train")
    return unpacked


def _packable(model: Any) -> list[Packable]:
    return [layer for _, layer in layers(model) if isinstance(layer, Packable)]


def _switch(model: Any, mode: str) -> None:
    for _, module in layers(model):
        getattr(module, mode)()
