"""Kernels in 4 bits as torchao and qwix store them, all in float32.

torchao's kernel is (outputs, inputs) and here transposed. What is not taken:

- its scales' scales, where 128 steps are the largest deviation and the 128th above the mean is
  clipped: the kernel that comes back differs by a step of its scales;
- the scale of its and qwix's symmetric 4-bit integers, max |w| / 7.5, which clips the largest
  weight: the codes are for a scale that is given.
"""

from typing import Any

VERSIONS = {"qwix": "0.1.8", "torchao": "0.18.0"}

# 8 inputs of 2 outputs, row by row, as is every kernel here.
KERNEL = [0.62, -1.3, -0.17, 0.44, 1.1, 0.26, -0.48, -0.09]
KERNEL += [0.03, 1.21, 0.88, -0.55, -1.45, 0.37, 0.24, 0.69]


def values() -> dict[str, Any]:
    """Inputs and what comes of them, by name."""
    import jax.numpy as jnp
    import torch
    from qwix._src.core import qarray
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    weight = torch.tensor(KERNEL).reshape(8, 2).T.contiguous()

    def of_outputs(array: Any) -> list[float]:
        return array.reshape(2, -1).T.ravel().tolist()

    nf4 = NF4Tensor.from_tensor(weight, 8, 2)
    nibbles = torch.stack([nf4.quantized_data >> 4, nf4.quantized_data & 15], -1)

    how = qarray.HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 4})
    blocks = qarray.quantize(jnp.asarray(KERNEL).reshape(8, 2), how)

    def int4(scale: Any, zero: Any, low: int, high: int) -> dict[str, Any]:
        limits = {"quant_min": low, "quant_max": high}
        codes = quantize_affine(weight, (1, 4), scale, zero, torch.int8, **limits)
        back = dequantize_affine(codes, (1, 4), scale, zero, torch.int8, **limits)
        found = {"scales": scale, "zeros": zero, "codes": codes, "kernel": back}
        return {name: of_outputs(value) for name, value in found.items()}

    scale = weight.reshape(2, 2, 4).abs().amax(-1) / 7
    affine = choose_qparams_affine(
        weight, MappingType.ASYMMETRIC, (1, 4), torch.int8, quant_min=0, quant_max=15, eps=1e-12
    )
    return {
        "kernel": KERNEL,
        "nf4": {
            "codes": of_outputs(nibbles),
            "kernel": of_outputs(nf4.get_original_weight()),
            "step": (1 / nf4.quantization_factor).item(),
        },
        "nf4_blocks": {
            "codes": blocks.qvalue.astype(int).ravel().tolist(),
            "scales": blocks.scale.ravel().tolist(),
        },
        "int4": int4(scale, torch.zeros_like(scale, dtype=torch.int32), -8, 7),
        "int4_affine": int4(*affine, 0, 15),
    }
