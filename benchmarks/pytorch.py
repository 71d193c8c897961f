"""The same layers in PyTorch, where it is installed and has them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = F = None  # type: ignore[assignment]


def step(name: str, example: tuple[Any, ...]) -> Callable[[], Any] | None:
    """A function that computes value and gradient once, eagerly; None where there is none.

    Args:
        name: the catalogue's name of the layer.
        example: an example of it.
    """
    if torch is None or name not in _LAYERS:
        return None
    torch.set_num_threads(2)
    layer = next((part for part in example if isinstance(part, nnx.Module)), None)
    inputs = [_tensor(a) for a in example if isinstance(a, jax.Array)]
    compute = _LAYERS[name]
    if name in _POOLINGS:
        inputs = [_images(t).contiguous() for t in inputs]
        compute = functools.partial(compute, **example[0].keywords)
    params = {} if layer is None else _parameters(layer, inputs[0].dtype)
    leaves = [t for t in (*inputs, *params.values()) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        g = torch.randn_like(compute(params, *inputs))
    except (RuntimeError, KeyError):
        return None

    def run() -> Any:
        for leaf in leaves:
            leaf.grad = None
        compute(params, *inputs).backward(g)
        return leaves[0].grad

    return run


def _tensor(array: jax.Array) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.asarray(array, np.float32).copy()).to(torch.bfloat16)
    return torch.from_numpy(np.asarray(array).copy())


def _parameters(layer: nnx.Module, dtype: Any) -> dict[str, Any]:
    """Parameters by name; PyTorch wants them in the dtype of the input."""
    found = {
        path[-1]: _tensor(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    return {k: v.to(dtype) if dtype == torch.bfloat16 else v for k, v in found.items()}


def _images(x: Any) -> Any:
    """(n, h, w, c) as PyTorch names it, (n, c, h, w); the memory stays as it is."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _window(window_shape: Any, strides: Any, padding: str = "VALID") -> tuple[Any, ...]:
    """Size, stride and padding; PyTorch has SAME only as an even one."""
    return window_shape, strides, [k // 2 if padding == "SAME" else 0 for k in window_shape]


_LAYERS: dict[str, Callable[..., Any]] = {
    "Linear": lambda p, x: F.linear(x, p["kernel"].T, p.get("bias")),
    "Embed": lambda p, ids: F.embedding(ids, p["embedding"]),
    "LayerNorm": lambda p, x: F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6),
    "RMSNorm": lambda p, x: F.rms_norm(x, x.shape[-1:], p["scale"], 1e-6),
    "GroupNorm": lambda p, x: F.group_norm(_images(x), 32, p["scale"], p["bias"], 1e-6),
    "InstanceNorm": lambda p, x: F.instance_norm(
        _images(x), weight=p["scale"], bias=p["bias"], eps=1e-6
    ),
    "BatchNorm": lambda p, x: F.batch_norm(
        _images(x), None, None, p["scale"], p["bias"], training=True
    ),
    "PReLU": lambda p, x: F.prelu(x, p["negative_slope"].reshape(1)),
    "gelu": lambda p, x: F.gelu(x, approximate="tanh"),
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
}
_POOLINGS = {"max_pool", "min_pool", "avg_pool"}
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
    _LAYERS[_same] = lambda p, x, _same=_same: getattr(F, _same)(x)
