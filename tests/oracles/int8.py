"""Products in int8 as torchao, AQT and qwix compute them, in float32.

torchao divides the largest element by 127, as here. AQT does with `preserve_max_val`, which it is
given here; its default, and all that qwix has, is 127.5: qwix's bound is set to 127. AQT's backward
takes the codes of the forward, and by default rounds them once more: here it does not.

Not taken, because it is another choice:

- the int8 backward of torchao, which rounds kernel and input anew, with scales of their own;
- the int8 backward of qwix for a product, which folds scales as AQT's does;
- grouped convolutions of qwix, whose gradients fail.
"""

from typing import Any

VERSIONS = {"torchao": "0.18.0", "aqtp": "0.9.0", "qwix": "0.1.8"}

X = [[0.3, -1.2, 0.7, 2.0], [127.0, 0.5, -2.5, -63.5]]
KERNEL = [[0.5, -1.0], [1.0, 0.45], [-1.0, 0.7], [3.0, 0.1]]
COTANGENT = [[1.0, -0.5], [-0.7, 0.3]]
IMAGES = [[[0.3, -1.2], [0.7, 2.0], [0.05, 0.4]], [[9.0, 1.0], [-4.0, 2.0], [5.0, 3.0]]]
WINDOW = [[[0.5, -1.0], [1.0, 0.45]], [[-1.0, 0.2], [3.0, -0.1]]]
IMAGE_COTANGENT = [[[1.0, -0.5], [0.3, 0.8]], [[0.6, 0.2], [-0.9, 0.7]]]


def values() -> dict[str, Any]:
    """Inputs, and by name what comes of them, flat."""
    return {
        "x": X,
        "kernel": KERNEL,
        "cotangent": COTANGENT,
        "images": IMAGES,
        "window": WINDOW,
        "image_cotangent": IMAGE_COTANGENT,
        "torchao": _torchao(),
        "aqt": _aqt(),
        **_qwix(),
    }


def _torchao() -> dict[str, Any]:
    import torch
    from torchao.prototype.quantized_training import int8, int8_mixed_precision

    config = int8_mixed_precision.Int8MixedPrecisionTrainingConfig(
        output=True, grad_input=False, grad_weight=False
    )
    x, kernel = torch.tensor(X, requires_grad=True), torch.tensor(KERNEL, requires_grad=True)
    linear = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction
    y = linear.apply(x, kernel.T, None, config)
    dx, dkernel = torch.autograd.grad(y, (x, kernel), torch.tensor(COTANGENT))
    codes, scale = int8.quantize_int8_rowwise(torch.tensor(X))
    found = {"codes": codes, "scale": scale, "y": y.detach(), "dx": dx, "dkernel": dkernel}
    return {name: value.flatten().tolist() for name, value in found.items()}


def _aqt() -> dict[str, Any]:
    import aqt.jax.v2.config as aqt
    import jax
    import jax.numpy as jnp

    config = aqt.fully_quantized(use_stochastic_rounding=False)
    plain = aqt.default_unquantized_config()
    config.dlhs.dg_quantizer.rhs = plain.dlhs.dg_quantizer.rhs
    config.drhs.dg_quantizer.rhs = plain.drhs.dg_quantizer.rhs
    aqt.set_accumulator_dtype(config, jnp.int32, None, None)
    for product in (config.fwd, config.dlhs, config.drhs):
        for side in (product.dg_quantizer.lhs, product.dg_quantizer.rhs):
            if hasattr(side.numerics, "preserve_max_val"):
                side.numerics = side.numerics.replace(preserve_max_val=True)

    def linear(x: Any, kernel: Any) -> Any:
        return config(x, kernel, (((1,), (0,)), ((), ())))

    return _gradients(jax.vjp(linear, jnp.array(X), jnp.array(KERNEL)), jnp.array(COTANGENT))


def _qwix() -> dict[str, Any]:
    import functools
    from unittest import mock

    import jax
    import jax.numpy as jnp
    from qwix._src.core import conv_general_qt, dot_general_qt, numerics

    int8 = {"lhs_qtype": jnp.int8, "rhs_qtype": jnp.int8}
    dot = dot_general_qt.DotGeneralQtConfig(**int8, use_original_residuals=True)
    rounded = {"dlhs_grad_qtype": jnp.int8, "drhs_grad_qtype": jnp.int8}
    conv = conv_general_qt.ConvGeneralQtConfig(**int8, **rounded)
    linear = functools.partial(
        dot_general_qt.dot_general_qt, dimension_numbers=(((1,), (0,)), ((), ())), config=dot
    )
    convolution = functools.partial(
        conv_general_qt.conv_general_qt,
        config=conv,
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    with mock.patch.object(numerics, "get_symmetric_bound", return_value=127.0):
        of_linear = jax.vjp(linear, jnp.array(X), jnp.array(KERNEL))
        of_images = jax.vjp(convolution, jnp.array(IMAGES), jnp.array(WINDOW))
        return {
            "qwix_original": _gradients(of_linear, jnp.array(COTANGENT)),
            "qwix_conv": _gradients(of_images, jnp.array(IMAGE_COTANGENT)),
        }


def _gradients(found: Any, g: Any) -> dict[str, Any]:
    y, pull = found
    dx, dkernel = pull(g)
    return {"y": y.ravel().tolist(), "dx": dx.ravel().tolist(), "dkernel": dkernel.ravel().tolist()}
