"""The layers of the catalogue in PyTorch, eagerly, where it is installed and has them.

What takes images is computed in both layouts of PyTorch, channels first and channels last.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import pytorch_convolutions

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = F = None  # type: ignore[assignment]

_TOO_LONG = 2.0
"""Seconds of a forward; products in bfloat16 take minutes on a processor without them."""


def steps(name: str, example: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """Functions that compute value and gradient once, by layout; none where there is no layer.

    Args:
        name: the catalogue's name of the layer.
        example: an example of it: what is called, and its arguments.
    """
    function, *arguments = example
    if name in ("Conv", "ConvTranspose"):
        return pytorch_convolutions.steps(function, *arguments)
    if torch is None or name not in _LAYERS:
        return {}
    torch.set_num_threads(2)
    layouts = {"torch": torch.contiguous_format}
    if name in _ON_IMAGES:
        layouts["channels last"] = torch.channels_last
    made = {layout: _step(name, example, form) for layout, form in layouts.items()}
    return {layout: step for layout, step in made.items() if step is not None}


def _step(name: str, example: tuple[Any, ...], layout: Any) -> Callable[[], Any] | None:
    """Value and gradient; None where they take too long to be called in rounds."""
    layer = next((part for part in example if isinstance(part, nnx.Module)), None)
    inputs = [_tensor(a) for a in example if isinstance(a, jax.Array | np.ndarray)]
    if name in _ON_IMAGES:
        inputs = [x.permute(0, 3, 1, 2).contiguous(memory_format=layout) for x in inputs]
    params = {} if layer is None else _parameters(layer, inputs[0].dtype)
    compute = functools.partial(
        _LAYERS[name], params, *inputs, **getattr(example[0], "keywords", {})
    )
    tensors = [t for t in (*inputs, *params.values()) if isinstance(t, torch.Tensor)]
    leaves = [t for t in tensors if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    began = time.perf_counter()
    g = torch.randn_like(compute())
    if time.perf_counter() - began > _TOO_LONG:
        return None

    def run() -> Any:
        for leaf in leaves:
            leaf.grad = None
        compute().backward(g)
        return leaves[0].grad

    return run


def _tensor(array: Any) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.asarray(array, np.float32).copy()).to(torch.bfloat16)
    return torch.from_numpy(np.asarray(array).copy())


def _parameters(layer: nnx.Module, dtype: Any) -> dict[str, Any]:
    """Parameters by name; PyTorch wants them in the dtype of the input."""
    if type(layer).__name__ in _RECURRENT:
        return _recurrent(layer)
    found = {
        path[-1]: _tensor(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    return {k: v.to(dtype) if dtype == torch.bfloat16 else v for k, v in found.items()}


def _recurrent(cell: Any) -> dict[str, Any]:
    """A module of PyTorch of the size of a cell, and its parameters; values of its own."""
    make = getattr(torch.nn, _RECURRENT[type(cell).__name__])
    module = make(cell.in_features, cell.hidden_features, batch_first=True)
    return dict(module.named_parameters()) | {"module": module}


def _window(window_shape: Any, strides: Any, padding: str = "VALID") -> tuple[Any, ...]:
    """Size, stride and padding; PyTorch has SAME only as an even one."""
    return window_shape, strides, [k // 2 if padding == "SAME" else 0 for k in window_shape]


def _attention(p: Any, q: Any, k: Any, v: Any, is_causal: bool = False) -> Any:
    heads_first = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)


def _cross_entropy(p: Any, logits: Any, labels: Any) -> Any:
    labels = labels if labels.is_floating_point() else labels.long()
    return F.cross_entropy(logits, labels, reduction="none")


_LAYERS: dict[str, Callable[..., Any]] = {
    "Linear": lambda p, x: F.linear(x, p["kernel"].T, p.get("bias")),
    "LinearGeneral": lambda p, x: torch.tensordot(x, p["kernel"], x.ndim - 2) + p["bias"],
    "Embed": lambda p, x: (
        x @ p["embedding"].T if x.is_floating_point() else F.embedding(x, p["embedding"])
    ),
    "LayerNorm": lambda p, x: F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6),
    "RMSNorm": lambda p, x: F.rms_norm(x, x.shape[-1:], p["scale"], 1e-6),
    "GroupNorm": lambda p, x: F.group_norm(x, 32, p["scale"], p["bias"], 1e-6),
    "InstanceNorm": lambda p, x: F.instance_norm(x, weight=p["scale"], bias=p["bias"], eps=1e-6),
    "BatchNorm": lambda p, x: F.batch_norm(x, None, None, p["scale"], p["bias"], training=True),
    "PReLU": lambda p, x: F.prelu(x, p["negative_slope"].reshape(1)),
    "gelu": lambda p, x, approximate=True: F.gelu(x, approximate="tanh" if approximate else "none"),
    "softmax": lambda p, x: F.softmax(x, -1),
    "log_softmax": lambda p, x: F.log_softmax(x, -1),
    "logsumexp": lambda p, x: x.logsumexp(-1),
    "tanh": lambda p, x: x.tanh(),
    "sigmoid": lambda p, x: x.sigmoid(),
    "swiglu": lambda p, gate, up: F.silu(gate) * up,
    "geglu": lambda p, gate, up: F.gelu(gate, approximate="tanh") * up,
    "reglu": lambda p, gate, up: F.relu(gate) * up,
    "log_sigmoid": lambda p, x: F.logsigmoid(x),
    "hard_tanh": lambda p, x: F.hardtanh(x),
    "hard_sigmoid": lambda p, x: F.hardsigmoid(x),
    "hard_silu": lambda p, x: F.hardswish(x),
    "soft_sign": lambda p, x: F.softsign(x),
    "max_pool": lambda p, x, **window: F.max_pool2d(x, *_window(**window)),
    "min_pool": lambda p, x, **window: -F.max_pool2d(-x, *_window(**window)),
    "avg_pool": lambda p, x, **window: F.avg_pool2d(x, *_window(**window)),
    "dot_product_attention": _attention,
    "Dropout": lambda p, x: F.dropout(x, 0.5),
    "softmax_cross_entropy": _cross_entropy,
    "sigmoid_binary_cross_entropy": lambda p, x, labels: F.binary_cross_entropy_with_logits(
        x, labels.to(x.dtype), reduction="none"
    ),
    "linear_cross_entropy": lambda p, x, kernel, labels: F.cross_entropy(x @ kernel, labels.long()),
}
_ON_IMAGES = {"GroupNorm", "InstanceNorm", "BatchNorm", "max_pool", "min_pool", "avg_pool"}
_RECURRENT = {
    "OptimizedLSTMCell": "LSTM",
    "LSTMCell": "LSTM",
    "GRUCell": "GRU",
    "SimpleCell": "RNN",
}
for _cell in _RECURRENT:
    _LAYERS[_cell] = lambda p, x, **weights: p["module"](x)[0]
for _same in (
    "silu",
    "relu",
    "relu6",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "softplus",
    "mish",
    "glu",
):
    _LAYERS[_same] = lambda p, x, _same=_same, **ours: getattr(F, _same)(x)
