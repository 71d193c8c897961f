"""Quantized layers as qwix, AQT and torchao compute them, in float32.

qwix and AQT put the largest magnitude at 127.5 steps, which clips half a step of it, and here it
is at 127: qwix is told so by its factor of the range, AQT by `preserve_max_val`.

- qwix, "original": the operands as they came in the backward, its default where the backward is
  not quantized; "quantized": those of the forward. A convolution's backward takes the quantized
  ones always. Grouped convolutions are not taken: qwix 0.1.8 has no gradient for them.
- AQT takes the operands as they came in a backward that is not quantized.
- torchao's BitNet layer has no norm; its backward fails unless a bias, or None for it, is passed.
"""

from typing import Any

VERSIONS = {"qwix": "0.1.8", "aqtp": "0.9.0", "torchao": "0.18.0"}

X = [[0.3, -1.2, 0.7], [1.5, 0.4, -0.6]]
KERNEL = [[1.0, -0.5], [0.25, 0.8], [-0.37, 0.1]]
COTANGENT = [[1.0, -0.5], [-1.0, 0.25]]
SIGNAL = [[[0.3], [0.7], [-1.2], [0.65]]]
WINDOW = [[[1.0, -0.33]], [[-0.37, 0.9]]]
SIGNAL_COTANGENT = [[[1.0, -0.5], [-1.0, 0.5], [1.5, 0.25]]]

_TO_127 = f"absmax,{127.5 / 127!r}"


def values() -> dict[str, Any]:
    """Inputs, and by name what comes of them, flat."""
    import jax
    import jax.numpy as jnp

    def with_gradients(f: Any, x: Any, kernel: Any, g: Any) -> dict[str, Any]:
        y, pull = jax.vjp(f, jnp.array(x), jnp.array(kernel))
        dx, dkernel = pull(jnp.array(g))
        return {"y": flat(y), "dx": flat(dx), "dkernel": flat(dkernel)}

    def flat(a: Any) -> list[float]:
        return a.ravel().tolist()

    return {
        "x": X,
        "kernel": KERNEL,
        "cotangent": COTANGENT,
        "signal": SIGNAL,
        "window": WINDOW,
        "signal_cotangent": SIGNAL_COTANGENT,
        "qwix": {
            "original": with_gradients(_qwix_linear(True), X, KERNEL, COTANGENT),
            "quantized": with_gradients(_qwix_linear(False), X, KERNEL, COTANGENT),
            "conv": with_gradients(_qwix_conv(), SIGNAL, WINDOW, SIGNAL_COTANGENT),
        },
        "aqt": with_gradients(_aqt_linear(), X, KERNEL, COTANGENT),
        "torchao": _bitnet(),
    }


def _qwix_linear(original: bool) -> Any:
    """8 bits: one range for x, one for each column of the kernel."""
    import jax.numpy as jnp
    from qwix._src.core import dot_general_qt as qt

    config = qt.DotGeneralQtConfig(
        lhs_qtype=jnp.int8,
        rhs_qtype=jnp.int8,
        lhs_calibration_method=_TO_127,
        rhs_calibration_method=_TO_127,
        lhs_disable_channelwise_axes=True,
        use_original_residuals=original,
    )
    return lambda x, w: qt.dot_general_qt(x, w, (((1,), (0,)), ((), ())), config)


def _qwix_conv() -> Any:
    """8 bits, VALID, along one axis of space."""
    import jax.numpy as jnp
    from qwix._src.core import conv_general_qt as qt

    config = qt.ConvGeneralQtConfig(
        lhs_qtype=jnp.int8,
        rhs_qtype=jnp.int8,
        lhs_calibration_method=_TO_127,
        rhs_calibration_method=_TO_127,
        lhs_disable_channelwise_axes=True,
    )
    return lambda x, w: qt.conv_general_qt(
        x, w, config, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
    )


def _aqt_linear() -> Any:
    """8 bits: one range for each row of x, one for each column of the kernel."""
    import aqt.jax.v2.config as aqt
    import jax.numpy as jnp

    config = aqt.fully_quantized(use_stochastic_rounding=False)
    plain = aqt.default_unquantized_config()
    config.dlhs, config.drhs = plain.dlhs, plain.drhs
    aqt.set_accumulator_dtype(config, jnp.int32, None, None)
    for side in (config.fwd.dg_quantizer.lhs, config.fwd.dg_quantizer.rhs):
        side.numerics = side.numerics.replace(preserve_max_val=True)
    return lambda x, w: config(x, w, (((1,), (0,)), ((), ())))


def _bitnet() -> dict[str, Any]:
    """The layer of BitNet b1.58."""
    import torch
    from torchao.prototype.quantized_training.bitnet import BitNetTrainingLinearWeight

    x = torch.tensor(X, requires_grad=True)
    kernel = torch.tensor(KERNEL)
    weight = torch.nn.Parameter(BitNetTrainingLinearWeight(kernel.T.contiguous()))
    y = torch.nn.functional.linear(x, weight, None)
    (y * torch.tensor(COTANGENT)).sum().backward()
    assert x.grad is not None
    found = {"y": y, "dx": x.grad, "dkernel": weight.grad.T}
    return {name: a.flatten().tolist() for name, a in found.items()}
