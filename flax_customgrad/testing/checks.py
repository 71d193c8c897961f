"""The checks in float64, each a generator of comparisons: a case, a gradient, its expected value.

The expected value always comes from autodiff of the reference, without the transform under test: a
batch is a Python loop, a mesh is one device. Only for second derivatives is the reference
transformed as well.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_customgrad.contract.arguments import by_path
from flax_customgrad.testing.compare import ALONE, SHARD_MAP, Comparison, Fn, Skip
from flax_customgrad.testing.problem import Gradient, Problem, replaced, weigh

_BATCH = 2
_DEVICES = 8
# A slope has fewer digits than its values.
_SLOPE_TOLERANCE = 1e-6
_MODES: dict[str, dict[str, Any]] = {
    "graph and updates": {"graph": True, "graph_updates": True},
    "graph": {"graph": True, "graph_updates": False},
    "tree": {"graph": False, "graph_updates": False},
}


def autodiff(p: Problem) -> Iterator[Comparison]:
    """The gradient against autodiff of the reference, and the value against its value; eager."""
    yield Comparison("value", p.value, lambda: p.expected_value, of="output", program=ALONE)

    def gradient(fn: Fn) -> Gradient:
        return jax.vjp(p.outputs(fn), *p.values)[1](p.cotangent)

    yield Comparison("gradient", gradient, lambda: p.expected, program=ALONE)


def finite_differences(p: Problem) -> Iterator[Comparison]:
    """The gradient along a direction against the slope of the value, one argument at a time."""
    step = 1e-5
    directions = dict(zip(p.differentiable, p.directions(seed=0), strict=True))
    objective = jax.jit(p.objective(p.fn))

    def slope(i: int) -> jax.Array:
        ahead, behind = list(p.arrays), list(p.arrays)
        ahead[i] += step * directions[i]
        behind[i] -= step * directions[i]
        return (objective(*ahead) - objective(*behind)) / (2 * step)

    def along(fn: Fn) -> Gradient:
        gradient = jax.jit(p.gradient(fn))(*p.arrays)
        pairs = zip(gradient, p.differentiable, strict=True)
        return tuple(jnp.vdot(g, directions[i]) for g, i in pairs)

    yield Comparison(
        "central",
        along,
        lambda: tuple(slope(i) for i in p.differentiable),
        tolerance=lambda expected: _SLOPE_TOLERANCE,
    )


def jit(p: Problem) -> Iterator[Comparison]:
    """Under jax.jit."""

    def value(fn: Fn) -> Gradient:
        return tuple(jax.tree.leaves(jax.jit(p.apply(fn))(*p.arrays)))

    yield Comparison("value", value, lambda: p.expected_value, of="output")
    yield Comparison("gradient", lambda fn: jax.jit(p.gradient(fn))(*p.arrays), lambda: p.expected)


def vmap(p: Problem) -> Iterator[Comparison]:
    """Under jax.vmap: each example its own arrays, or some of them the same for all examples."""
    everything = tuple(_all(p))
    own = p.batch(_BATCH, everything, seed=1)
    yield Comparison(
        "parameters batched",
        lambda fn: jax.jit(jax.vmap(p.gradient(fn)))(*own),
        lambda: _joined(p, _each(p, own, everything), everything),
    )

    def over_batch(fn: Fn, arrays: list[jax.Array], shared: Sequence[int]) -> Gradient:
        axes = tuple(None if i in shared else 0 for i in everything)
        total = _summed(jax.vmap(p.objective(fn), axes))
        return jax.jit(jax.grad(total, p.differentiable))(*arrays)

    for name, shared in _shared_by_all(p).items():
        mapped = [i for i in everything if i not in shared]
        arrays = p.batch(_BATCH, mapped, seed=2)
        yield Comparison(
            f"{name} shared",
            functools.partial(over_batch, arrays=arrays, shared=shared),
            lambda arrays=arrays, mapped=mapped: _joined(p, _each(p, arrays, mapped), mapped),
        )


def _shared_by_all(p: Problem) -> dict[str, tuple[int, ...]]:
    """What all examples of a batch may share: the parameters, and any array that may be one."""
    shared = {"parameters": p.parameters} if p.inputs and p.parameters else {}
    bare = [i for i in p.inputs if i in p.differentiable]
    if len(bare) > 1:
        shared |= {p.names[i]: (*p.parameters, i) for i in bare}
    return shared


def scan(p: Problem) -> Iterator[Comparison]:
    """Inside jax.lax.scan over inputs, with the parameters outside of it."""
    over = p.inputs or tuple(_all(p))
    stacked = p.batch(_BATCH, over, seed=3)

    def over_steps(fn: Fn) -> Gradient:
        def total(*arrays: jax.Array) -> jax.Array:
            def body(carry: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
                return carry + p.objective(fn)(*replaced(arrays, over, xs)), None

            return jax.lax.scan(body, jnp.zeros(()), tuple(arrays[i] for i in over))[0]

        return jax.jit(jax.grad(total, p.differentiable))(*stacked)

    yield Comparison("", over_steps, lambda: _joined(p, _each(p, stacked, over), over))


def remat(p: Problem) -> Iterator[Comparison]:
    """Under jax.checkpoint."""

    def again(fn: Fn) -> Gradient:
        gradient = jax.grad(jax.checkpoint(p.objective(fn)), p.differentiable)
        return jax.jit(gradient)(*p.arrays)

    yield Comparison("", again, lambda: p.expected)


def second_order(p: Problem) -> Iterator[Comparison]:
    """Derivatives of the gradient: reverse over reverse, and forward over reverse."""
    along = p.directions(seed=4)

    def reverse(fn: Fn) -> Gradient:
        def dot(*arrays: jax.Array) -> jax.Array:
            pairs = zip(p.gradient(fn)(*arrays), along, strict=True)
            return sum((jnp.vdot(g, v) for g, v in pairs), jnp.zeros(()))

        return jax.jit(jax.grad(dot, p.differentiable))(*p.arrays)

    def forward(fn: Fn) -> Gradient:
        gradient = p.of_differentiable(p.gradient(fn))
        return jax.jit(lambda *at: jax.jvp(gradient, at, along)[1])(*p.values)

    yield Comparison("grad of grad", reverse, lambda: reverse(p.reference))
    yield Comparison("jvp of grad", forward, lambda: forward(p.reference), is_forward=True)


def modes(p: Problem) -> Iterator[Comparison]:
    """Through the transforms of NNX, in each of its modes, where the first argument is a Module."""
    module, *rest = p.args
    if not isinstance(module, nnx.Module):
        return
    arrays = tuple(arg for arg in rest if isinstance(arg, jax.Array))
    twice = tuple(jnp.stack([a, a]) for a in arrays)
    axes = (None, *(0 for _ in arrays))
    params = [leaf for _, leaf in by_path(p.packed.positions()[0]) if isinstance(leaf, nnx.Param)]
    own = [k for k, i in enumerate(p.differentiable) if i in jax.tree.leaves(params)]
    names = [p.names[p.differentiable[k]] for k in own]

    def loss(fn: Fn) -> Callable[..., jax.Array]:
        def of_module_and_arrays(m: nnx.Module, *arrays: jax.Array) -> jax.Array:
            given = iter(arrays)
            return weigh(fn(m, *(next(given) if isinstance(a, jax.Array) else a for a in rest)))

        return of_module_and_arrays

    def run(
        transform: Callable[..., Any], inputs: tuple[jax.Array, ...]
    ) -> Callable[[Fn], Gradient]:
        def of_function(fn: Fn) -> Gradient:
            gradient = transform(loss(fn))(module, *inputs)
            return tuple(jax.tree.leaves(nnx.state(gradient, nnx.Param)))

        return of_function

    for mode_name, mode in _MODES.items():
        grad = functools.partial(nnx.grad, **mode)
        vmap = functools.partial(nnx.vmap, in_axes=axes, **mode)
        scan = functools.partial(nnx.scan, in_axes=axes, out_axes=0, **mode)
        once = {
            "nnx.jit": lambda f, grad=grad, mode=mode: nnx.jit(grad(f), **mode),
            "nnx.remat": lambda f, grad=grad, mode=mode: grad(nnx.remat(f, **mode)),
        }
        batched = {
            "nnx.vmap": lambda f, grad=grad, vmap=vmap: grad(_summed(vmap(f))),
            "nnx.scan": lambda f, grad=grad, scan=scan: grad(_summed(scan(f))),
        }
        for name, transform in once.items():
            yield Comparison(
                f"{name}, {mode_name}",
                run(transform, arrays),
                lambda: tuple(p.expected[k] for k in own),
                of=names,
            )
        for name, transform in batched.items() if arrays else ():
            yield Comparison(
                f"{name}, {mode_name}",
                run(transform, twice),
                lambda: tuple(2 * p.expected[k] for k in own),
                of=names,
            )


def mesh(p: Problem) -> Iterator[Comparison]:
    """On a mesh of 4 by 2 devices: inputs split over the batch, parameters over their last axis."""
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        yield Comparison(
            f"{axis_type.name} axes",
            lambda fn, axis_type=axis_type: _on_mesh(p, fn, axis_type),
            lambda: p.expected,
            program=ALONE,
        )


def shard_map(p: Problem) -> Iterator[Comparison]:
    """Under jax.shard_map over 8 devices: inputs split over the batch, parameters on each."""
    for check_vma in (True, False):
        yield Comparison(
            f"check_vma={check_vma}",
            lambda fn, check_vma=check_vma: _in_shard_map(p, fn, check_vma),
            lambda: _each_shard(p),
            program=SHARD_MAP,
        )


def _summed(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: jnp.sum(fn(*args))


def _each(p: Problem, arrays: list[jax.Array], batched: Sequence[int]) -> list[Gradient]:
    """The reference's gradient of each example of a batch."""
    gradient = p.expected_gradient
    size = len(arrays[batched[0]])
    return [
        gradient(*(a[k] if i in batched else a for i, a in enumerate(arrays))) for k in range(size)
    ]


def _joined(
    p: Problem,
    examples: list[Gradient],
    batched: Sequence[int],
    join: Callable[..., jax.Array] = jnp.stack,
) -> Gradient:
    """The gradient of the sum over examples: joined where batched, summed where shared."""
    columns = zip(p.differentiable, zip(*examples, strict=True), strict=True)
    return tuple(join(g) if i in batched else sum(g[1:], g[0]) for i, g in columns)


def _on_mesh(p: Problem, fn: Fn, axis_type: AxisType) -> Gradient:
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


def _in_shard_map(p: Problem, fn: Fn, check_vma: bool) -> Gradient:
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
    gradient = jax.grad(_summed(local), p.differentiable)
    return jax.jit(gradient)(*p.arrays)


def _each_shard(p: Problem) -> Gradient:
    split = _split_inputs(p)
    shards = [
        einops.rearrange(a, "(device b) ... -> device b ...", device=_DEVICES) if i in split else a
        for i, a in enumerate(p.arrays)
    ]
    return _joined(p, _each(p, shards, split), split, jnp.concatenate)


def _split_inputs(p: Problem) -> tuple[int, ...]:
    split = tuple(i for i in p.inputs if p.arrays[i].ndim and not len(p.arrays[i]) % _DEVICES)
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
