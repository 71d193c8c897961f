"""MX and NVFP4 codes as torchao computes them, all in float32.

Not taken, because the library deviates from its formulas:

- RCEIL's scale of a block of zeros, or one below 2^-118: codes of 2^-127 are decoded as such, but
  the elements were divided by 1 or by 2^-126;
- NVFP4's ties: torchao multiplies by inverses that are rounded, so that quotients half way between
  two elements fall to either side;
- NVFP4's scales below 2^-6, which it raises to that; here they go down to 2^-9, the least of E4M3.

qwix has an MX with another exponent, and NVFP4 without the factor of the whole array.
"""

from typing import Any

VERSIONS = {"torchao": "0.18.0", "torch": "2.13.0"}


def values() -> dict[str, Any]:
    """Inputs and their codes, by name."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    # Numbers of 12 bits, the same on every machine, of another size in each block.
    k = torch.arange(32)
    numbers = ((k * k * 37 + k * 101) % 4093 - 2047).float()
    x = numbers[:16] * torch.tensor([1e-9, 1e-2, 1.0, 3e9]).repeat_interleave(4)
    y = numbers * torch.tensor([1.0, 0.013]).repeat_interleave(16)

    def as_lists(scales: torch.Tensor, codes: torch.Tensor) -> dict[str, Any]:
        parts = {"scales": scales, "codes": codes}
        return {name: a.view(torch.uint8).flatten().tolist() for name, a in parts.items()}

    def mx(element: Any, mode: Any) -> dict[str, Any]:
        return as_lists(*to_mx(x[None], element, 4, mode))

    up, down = ScaleCalculationMode.RCEIL, ScaleCalculationMode.FLOOR
    factor = per_tensor_amax_to_scale(y.abs().max())
    return {
        "x": x.tolist(),
        "e4m3_up": mx(torch.float8_e4m3fn, up),
        "e4m3_down": mx(torch.float8_e4m3fn, down),
        "e5m2_up": mx(torch.float8_e5m2, up),
        "e2m1_up": mx(torch.float4_e2m1fn_x2, up),
        "e2m1_down": mx(torch.float4_e2m1fn_x2, down),
        "y": y.tolist(),
        "nvfp4": {"factor": factor.item(), **as_lists(*nvfp4_quantize(y[None], 16, factor))},
    }
