"""Quantizers as torch, Brevitas and torchao compute them, all in float32.

Not taken, because the libraries deviate from the formulas, or from each other:

- the gradient of what lies at most half a step outside of the range: torch and Brevitas look
  whether the rounded value is inside, the paper of LSQ (and this library) whether the value is;
  no element of X does;
- qwix and AQT's scale, max |x| / 127.5, which clips half a step of the largest magnitude.

Brevitas has the learned scale without LSQ's 1 / sqrt(N high), torch with it (`grad_factor`).
"""

from typing import Any

VERSIONS = {"torch": "2.13.0", "brevitas": "0.13.4", "torchao": "0.18.0"}

X = [[0.3, -1.2, 0.7], [2.3, -0.6, -3.1]]
COTANGENT = [[1.0, -0.5, 0.25], [-1.0, 3.0, 0.75]]
SCALE = 0.25
SCALES = [0.25, 0.5]


def values() -> dict[str, Any]:
    """Inputs and what comes of them, by name."""
    import torch
    from brevitas.core.function_wrapper.clamp import TensorClamp
    from brevitas.core.function_wrapper.ops_ste import RoundSte
    from brevitas.core.quant import BinaryQuant, ClampedBinaryQuant, IntQuant
    from brevitas.core.scaling import ConstScaling
    from torchao.prototype.quantized_training import bitnet

    cotangent = torch.tensor(COTANGENT)

    def applied(function: Any, *learned: Any) -> dict[str, Any]:
        """Values of x, and the gradients of x and of what is learned."""
        leaves = [torch.tensor(a, requires_grad=True) for a in (X, *learned)]
        y = function(*leaves)
        dx, *rest = torch.autograd.grad((y * cotangent).sum(), leaves)
        found = {"values": y, "dx": dx} | ({"dscale": rest[0]} if rest else {})
        return {name: value.tolist() for name, value in found.items()}

    def learned(x: Any, scale: Any) -> Any:
        gain = (x.numel() / scale.numel() * 7) ** -0.5
        zeros = torch.zeros_like(scale)
        if scale.numel() == 1:
            apply = torch._fake_quantize_learnable_per_tensor_affine
            return apply(x, scale, zeros, -8, 7, gain)
        apply = torch._fake_quantize_learnable_per_channel_affine
        return apply(x, scale, zeros, 0, -8, 7, gain)

    int_quant = IntQuant(
        narrow_range=False,
        signed=True,
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
        input_view_impl=torch.nn.Identity(),
    )
    zero, bits = torch.tensor(0.0), torch.tensor(4.0)
    mean = torch.tensor(X).abs().mean().item()
    w = torch.tensor(X)
    ternary = bitnet.quantize_bitnet_weight(w, bitnet.get_bitnet_scale(w))
    integers, scales = bitnet.quantize_int8_rowwise(w)
    return {
        "x": X,
        "cotangent": COTANGENT,
        "scale": SCALE,
        "scales": SCALES,
        "lsq": applied(learned, [SCALE]),
        "lsq, channels": applied(learned, SCALES),
        "lsq without a gradient scale": applied(
            lambda x, scale: int_quant(scale, zero, bits, x), SCALE
        ),
        "affine": applied(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.22, 9, 0, 15)),
        "binary": applied(lambda x: BinaryQuant(ConstScaling(mean))(x)[0]),
        "binary, clamped": applied(lambda x: ClampedBinaryQuant(ConstScaling(mean))(x)[0]),
        "ternary": {"codes": ternary.tolist(), "scale": bitnet.get_bitnet_scale(w).item()},
        "rows": {"integers": integers.tolist(), "scales": scales.flatten().tolist()},
    }
