"""Sharding on a mesh with Explicit axes, and over which devices a value varies."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_customgrad.contract.compat import varying_axes

AxisName = str | tuple[str, ...] | None
"""The axes of a `shard_map`, `pmap` or `vmap` over which arrays are parts of one; None for none."""


def explicit_sharding(aval: Any, order: Sequence[int] | None = None) -> NamedSharding | None:
    """The sharding of an array where it is part of the array's type, to ask for in a product.

    Args:
        aval: the type of an array, `jax.typeof(array)`.
        order: the array's axes in the order in which the product yields them.

    Returns:
        A sharding on a mesh with Explicit axes, None elsewhere.
    """
    sharding = aval.sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    if order is None:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[axis] for axis in order)))


def with_auto_axes(function: Callable[..., Any], specs: Any, *arrays: Any) -> Any:
    """Applies a function within which, on a mesh with Explicit axes, the compiler shards arrays.

    Args:
        function: a function of arrays.
        specs: the sharding of its results, a `PartitionSpec` for each.
        *arrays: trees of arrays.

    Returns:
        What the function returns.
    """
    found = (explicit_sharding(jax.typeof(a)) for a in jax.tree.leaves(arrays))
    on_mesh = next((sharding for sharding in found if sharding is not None), None)
    if on_mesh is None:
        return function(*arrays)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(on_mesh.mesh, spec),
        specs,
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
    with_auto = jax.sharding.auto_axes(function, out_sharding=shardings)
    return with_auto(*arrays)  # pyright: ignore[reportCallIssue]


def explicit_spec(array: jax.Array) -> PartitionSpec:
    """The `PartitionSpec` of an array on a mesh with Explicit axes; replicated elsewhere."""
    sharding = explicit_sharding(jax.typeof(array))
    return PartitionSpec(*(None,) * array.ndim) if sharding is None else sharding.spec


def varying_like(a: jax.Array, like: jax.Array) -> jax.Array:
    """Makes an array vary over the devices of a `shard_map` wherever another does."""
    return _varying_over(a, varying_axes(like))


def varying_alike(tree: Any) -> Any:
    """Makes every array of a tree vary over the devices of a `shard_map` that any of them does."""
    leaves = jax.tree.leaves(tree)
    names = frozenset().union(*map(varying_axes, leaves))
    return jax.tree.map(lambda a: _varying_over(a, names), tree) if names else tree


def _varying_over(a: jax.Array, names: frozenset[Any]) -> jax.Array:
    missing = names - varying_axes(a)
    return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a


def summed_like(g: jax.Array, like: jax.Array) -> jax.Array:
    """Sums a cotangent over the devices of a `shard_map` that share what it is the cotangent of."""
    shared = varying_axes(g) - varying_axes(like)
    return lax.psum(g, tuple(sorted(shared))) if shared else g
