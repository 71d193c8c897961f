"""The checks, each a generator of comparisons: which case, what the gradient is, what it should be.

What it should be always comes from the reference by autodiff, without the transform under test: a
batch is a Python loop, a mesh is one device. Only second derivatives have to be transformed alike.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_customgrad.testing.problem import Gradient, Problem, weigh

_BATCH = 2
_DEVICES = 8
_MODES: dict[str, dict[str, Any]] = {
    "graph and updates": {"graph": True, "graph_updates": True},
    "graph": {"graph": True, "graph_updates": False},
    "tree": {"graph": False, "graph_updates": False},
}


class Comparison(NamedTuple):
    """One gradient to compare.

    Attributes:
        case: which variant of the check.
        got: computes the gradient under test.
        expected: computes what it should be.
        needs: computes a thing without which the comparison makes no sense; if this raises, the
            case is skipped with the reason.
    """

    case: str
    got: Callable[[], Gradient]
    expected: Callable[[], Gradient]
    needs: Callable[[], Any] = lambda: None


class Skip(Exception):
    """A case cannot be run here; its text says why."""


def autodiff(p: Problem) -> Iterator[Comparison]:
    """The gradient against autodiff of the reference, and the value against its value."""
    yield Comparison(
        "value",
        lambda: tuple(jax.tree.leaves(p.apply(p.fn)(*p.arrays))),
        lambda: tuple(jax.tree.leaves(p.apply(p.reference)(*p.arrays))),
    )
    yield Comparison("gradient", lambda: p.gradient(p.fn)(*p.arrays), lambda: p.expected)


def finite_differences(p: Problem) -> Iterator[Comparison]:
    """The gradient along a direction against the slope of the value, one argument at a time."""
    rng, step = np.random.default_rng(0), 1e-5
    directions = {
        i: jnp.asarray(rng.standard_normal(p.arrays[i].shape), p.arrays[i].dtype)
        for i in p.differentiable
    }
    objective = jax.jit(p.objective(p.fn))

    def slope(i: int) -> jax.Array:
        ahead, behind = list(p.arrays), list(p.arrays)
        ahead[i] += step * directions[i]
        behind[i] -= step * directions[i]
        return (objective(*ahead) - objective(*behind)) / (2 * step)

    def along() -> Gradient:
        gradient = jax.jit(p.gradient(p.fn))(*p.arrays)
        pairs = zip(gradient, p.differentiable, strict=True)
        return tuple(jnp.vdot(g, directions[i]) for g, i in pairs)

    yield Comparison("central", along, lambda: tuple(slope(i) for i in p.differentiable))


def jit(p: Problem) -> Iterator[Comparison]:
    """Under jax.jit."""
    yield Comparison("", lambda: jax.jit(p.gradient(p.fn))(*p.arrays), lambda: p.expected)


def vmap(p: Problem) -> Iterator[Comparison]:
    """Under jax.vmap: each example its own parameters, or all examples the same."""
    everything = tuple(_all(p))
    own = p.batch(_BATCH, everything, seed=1)
    yield Comparison(
        "parameters batched",
        lambda: jax.jit(jax.vmap(p.gradient(p.fn)))(*own),
        lambda: _joined(p, _each(p, own, everything), everything, jnp.stack),
    )
    shared = p.batch(_BATCH, p.inputs, seed=2)
    axes = tuple(0 if i in p.inputs else None for i in everything)

    def total(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(p.objective(p.fn), axes)(*arrays))

    if p.inputs and p.parameters:
        yield Comparison(
            "parameters shared",
            lambda: jax.jit(jax.grad(total, p.differentiable))(*shared),
            lambda: _joined(p, _each(p, shared, p.inputs), p.inputs, jnp.stack),
        )


def scan(p: Problem) -> Iterator[Comparison]:
    """Inside jax.lax.scan over inputs, with the parameters outside of it."""
    over = p.inputs or tuple(_all(p))
    stacked = p.batch(_BATCH, over, seed=3)

    def total(*arrays: jax.Array) -> jax.Array:
        def body(carry: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            current = list(arrays)
            for i, x in zip(over, xs, strict=True):
                current[i] = x
            return carry + p.objective(p.fn)(*current), None

        xs = tuple(arrays[i] for i in over)
        return jax.lax.scan(body, jnp.zeros(()), xs)[0]

    yield Comparison(
        "",
        lambda: jax.jit(jax.grad(total, p.differentiable))(*stacked),
        lambda: _joined(p, _each(p, stacked, over), over, jnp.stack),
    )


def remat(p: Problem) -> Iterator[Comparison]:
    """Under jax.checkpoint."""
    again = jax.grad(jax.checkpoint(p.objective(p.fn)), p.differentiable)
    yield Comparison("", lambda: jax.jit(again)(*p.arrays), lambda: p.expected)


def second_order(p: Problem) -> Iterator[Comparison]:
    """Derivatives of the gradient: reverse over reverse, and forward over reverse."""
    rng = np.random.default_rng(4)
    along = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in _differentiable(p)]

    def reverse(fn: Callable[..., Any]) -> Gradient:
        def dot(*arrays: jax.Array) -> jax.Array:
            pairs = zip(p.gradient(fn)(*arrays), along, strict=True)
            return sum((jnp.vdot(g, v) for g, v in pairs), jnp.zeros(()))

        return jax.jit(jax.grad(dot, p.differentiable))(*p.arrays)

    def forward(fn: Callable[..., Any]) -> Gradient:
        def of_differentiable(*diff: jax.Array) -> Gradient:
            arrays = list(p.arrays)
            for i, a in zip(p.differentiable, diff, strict=True):
                arrays[i] = a
            return p.gradient(fn)(*arrays)

        pushed = jax.jit(lambda *diff: jax.jvp(of_differentiable, diff, tuple(along))[1])
        return pushed(*_differentiable(p))

    yield Comparison("grad of grad", lambda: reverse(p.fn), lambda: reverse(p.reference))
    yield Comparison("jvp of grad", lambda: forward(p.fn), lambda: forward(p.reference))


def modes(p: Problem) -> Iterator[Comparison]:
    """Through the transforms of NNX, in each of its modes, where the first argument is a Module."""
    module, *rest = p.args
    if not isinstance(module, nnx.Module):
        return
    arrays = tuple(arg for arg in rest if isinstance(arg, jax.Array))
    twice = tuple(jnp.stack([a, a]) for a in arrays)

    def loss(m: nnx.Module, *arrays: jax.Array) -> jax.Array:
        given = iter(arrays)
        return weigh(p.fn(m, *(next(given) if isinstance(a, jax.Array) else a for a in rest)))

    def leaves(gradient: Any) -> Gradient:
        return tuple(jax.tree.leaves(nnx.state(gradient, nnx.Param)))

    def expected(times: int) -> Callable[[], Gradient]:
        own = [k for k, i in enumerate(p.differentiable) if i in p.owned_by_first]
        return lambda: tuple(times * p.expected[k] for k in own)

    axes = (None, *(0 for _ in arrays))
    for mode_name, mode in _MODES.items():
        grad = functools.partial(nnx.grad, **mode)
        mapped = grad(_summed(nnx.vmap(loss, in_axes=axes, **mode)))
        scanned = grad(_summed(nnx.scan(loss, in_axes=axes, out_axes=0, **mode)))
        once = {"nnx.jit": nnx.jit(grad(loss), **mode), "nnx.remat": grad(nnx.remat(loss, **mode))}
        for transform, f in once.items():
            yield Comparison(
                f"{transform}, {mode_name}",
                lambda f=f: leaves(f(module, *arrays)),
                expected(1),
            )
        for transform, f in {"nnx.vmap": mapped, "nnx.scan": scanned}.items():
            if arrays:
                yield Comparison(
                    f"{transform}, {mode_name}",
                    lambda f=f: leaves(f(module, *twice)),
                    expected(2),
                )


def mesh(p: Problem) -> Iterator[Comparison]:
    """On a mesh of 4 by 2 devices: inputs split over the batch, parameters over their last axis."""
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        yield Comparison(
            f"{axis_type.name} axes",
            lambda t=axis_type: _on_mesh(p, p.fn, t),
            lambda: p.expected,
            needs=lambda t=axis_type: _on_mesh(p, p.reference, t),
        )


def shard_map(p: Problem) -> Iterator[Comparison]:
    """Under jax.shard_map over 8 devices: inputs split over the batch, parameters on each."""
    for check_vma in (True, False):
        yield Comparison(
            f"check_vma={check_vma}",
            lambda c=check_vma: _in_shard_map(p, p.fn, c),
            lambda: _each_shard(p),
            needs=lambda c=check_vma: _in_shard_map(p, p.reference, c),
        )


def _summed(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: jnp.sum(fn(*args))


def _differentiable(p: Problem) -> tuple[jax.Array, ...]:
    return tuple(p.arrays[i] for i in p.differentiable)


def _each(p: Problem, arrays: list[jax.Array], batched: Sequence[int]) -> list[Gradient]:
    """The reference's gradient of each example of a batch."""
    gradient = p.expected_gradient
    size = len(arrays[batched[0]])
    return [
        gradient(*(a[k] if i in batched else a for i, a in enumerate(arrays))) for k in range(size)
    ]


def _joined(
    p: Problem, examples: list[Gradient], batched: Sequence[int], join: Callable[..., jax.Array]
) -> Gradient:
    """The gradient of the sum over examples: joined where batched, summed where shared."""
    columns = zip(p.differentiable, zip(*examples, strict=True), strict=True)
    return tuple(join(g) if i in batched else sum(g[1:], g[0]) for i, g in columns)


def _on_mesh(p: Problem, fn: Callable[..., Any], axis_type: AxisType) -> Gradient:
    devices = _devices().reshape(4, 2)
    grid = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(grid):
        placed = []
        for i, a in enumerate(p.arrays):
            spec: list[str | None] = [None] * a.ndim
            if i in p.parameters and a.ndim and a.shape[-1] % 2 == 0:
                spec[-1] = "model"
            if i not in p.parameters and a.ndim and a.shape[0] % 4 == 0:
                spec[0] = "data"
            placed.append(jax.device_put(a, NamedSharding(grid, PartitionSpec(*spec))))
        return tuple(map(np.asarray, jax.jit(p.gradient(fn))(*placed)))


def _in_shard_map(p: Problem, fn: Callable[..., Any], check_vma: bool) -> Gradient:
    split = _split_inputs(p)
    line = jax.sharding.Mesh(_devices(), ("data",))
    specs = tuple(PartitionSpec("data") if i in split else PartitionSpec() for i in _all(p))
    local = jax.shard_map(
        lambda *arrays: p.objective(fn)(*arrays)[None],
        mesh=line,
        in_specs=specs,
        out_specs=PartitionSpec("data"),
        check_vma=check_vma,
    )
    gradient = jax.grad(lambda *arrays: jnp.sum(local(*arrays)), p.differentiable)
    return tuple(map(np.asarray, jax.jit(gradient)(*p.arrays)))


def _each_shard(p: Problem) -> Gradient:
    split = _split_inputs(p)
    shards = [
        einops.rearrange(a, "(device b) ... -> device b ...", device=_DEVICES) if i in split else a
        for i, a in enumerate(p.arrays)
    ]
    return _joined(p, _each(p, shards, split), split, jnp.concatenate)


def _split_inputs(p: Problem) -> tuple[int, ...]:
    split = tuple(i for i in p.inputs if p.arrays[i].shape[:1] and not p.arrays[i].shape[0] % 8)
    if not split:
        raise Skip(f"no input whose first axis divides by {_DEVICES}")
    return split


def _all(p: Problem) -> range:
    return range(len(p.arrays))


def _devices() -> np.ndarray:
    devices = jax.devices()
    if len(devices) < _DEVICES:
        raise Skip(
            f"needs {_DEVICES} devices, there are {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={_DEVICES} before importing jax"
        )
    return np.array(devices[:_DEVICES])
