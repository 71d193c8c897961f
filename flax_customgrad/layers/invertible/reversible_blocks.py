"""The blocks of `Reversible`: one applied and undone, and many, as a list or stacked.

A block takes its halves in float32 or wider. It is taken apart before it is called, into
parameters and the rest, because the backward calls f and g as the forward did: with the same
dropout, and by the same statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Halves = tuple[jax.Array, jax.Array]
"""The two streams of a block, or their cotangents, of one shape."""


class Block(nnx.Module):
    """The two functions of a block; each maps an array to one of the same shape."""

    def __init__(self, f: Callable[..., jax.Array], g: Callable[..., jax.Array]):
        self.f = f
        self.g = g


@dataclass(frozen=True)
class Config:
    """How the blocks are applied.

    Attributes:
        is_stacked: whether there is one block, with the Variables of all.
        dtype: that of x, in which f and g are called.
    """

    is_stacked: bool
    dtype: Any

    def call(self, function: Callable[..., Any], half: jax.Array) -> jax.Array:
        """What f or g adds to the other half, in the dtype of the halves."""
        addend = function(half.astype(self.dtype))
        if jnp.shape(addend) != half.shape:
            raise ValueError(
                f"Reversible: f and g keep the shape of a half, since they are added to the other; "
                f"one of them maps {half.shape} to {jnp.shape(addend)}"
            )
        return addend.astype(half.dtype)


class Parts(NamedTuple):
    """A block taken apart, from before a call."""

    graphdef: Any
    params: nnx.State
    """Its floating Variables, which have gradients."""
    rest: tuple[nnx.State, nnx.State]
    """Its other Variables, such as the counters of random streams, as f and as g found them."""


def cast(halves: Halves, dtype: Any) -> Halves:
    """Both halves in a dtype."""
    return halves[0].astype(dtype), halves[1].astype(dtype)


def apply_block(config: Config, block: Block, x: Halves) -> tuple[Halves, Parts]:
    """The output of a block, and its parts from before the call.

    Args:
        config: how the blocks are applied.
        block: the block; f and g may write to it.
        x: its input, float32 or wider.
    """
    graphdef, params, of_f = _split(block)
    x1, x2 = x
    y1 = x1 + config.call(block.f, x2)
    _, _, of_g = _split(block)
    y2 = x2 + config.call(block.g, y1)
    return (y1, y2), Parts(graphdef, params, (of_f, of_g))


def undo_block(
    config: Config, parts: Parts, y: Halves, dy: Halves
) -> tuple[Halves, Halves, nnx.State]:
    """The input of a block, its cotangent, and that of the parameters.

    Args:
        config: how the blocks are applied.
        parts: the block from before the call.
        y: its output, float32 or wider.
        dy: the cotangent of the output, in the dtype of y.
    """
    (y1, y2), (dy1, dy2) = y, dy
    g_of_y1, pull_g = _vjp(config, parts, "g", y1)
    from_g, de1 = pull_g(dy2)
    x2, e1 = y2 - g_of_y1, dy1 + de1
    f_of_x2, pull_f = _vjp(config, parts, "f", x2)
    from_f, dx2 = pull_f(e1)
    x1 = y1 - f_of_x2
    return (x1, x2), (e1, dy2 + dx2), jax.tree.map(jnp.add, from_f, from_g)


def _vjp(
    config: Config, parts: Parts, name: str, x: jax.Array
) -> tuple[jax.Array, Callable[..., Any]]:
    """Calls f or g as the forward did; what they write, the forward has written."""
    rest = parts.rest["fg".index(name)]

    def call(params: nnx.State, x: jax.Array) -> jax.Array:
        block = nnx.merge(parts.graphdef, params, rest, copy=True)
        return config.call(getattr(block, name), x)

    return jax.vjp(call, parts.params, x)


def inverse_of_block(config: Config, block: Block, y: Halves) -> Halves:
    """The input of a block whose f and g hold no changing state.

    Args:
        config: how the blocks are applied.
        block: the block.
        y: its output, float32 or wider.
    """
    y1, y2 = y
    x2 = y2 - config.call(block.g, y1)
    return y1 - config.call(block.f, x2), x2


def apply_stacked(config: Config, block: Block, x: Halves) -> tuple[Halves, Parts]:
    """Blocks whose Variables are stacked along a first axis, one after the other.

    Args:
        config: how the blocks are applied.
        block: one block that holds the Variables of all.
        x: the input of the first, float32 or wider.
    """
    graphdef, params, rest = _split(block)
    stacked = jax.tree.leaves((params, rest))

    def one(x: Halves, layer: tuple[nnx.State, nnx.State]) -> tuple[Halves, Any]:
        block = nnx.merge(graphdef, *layer, copy=True)
        y, parts = apply_block(config, block, x)
        before, after = jax.tree.leaves(layer), jax.tree.leaves(_split(block)[1:])
        written = {i: a for i, a in enumerate(after) if a is not before[i]}
        return y, (written, parts.rest)

    y, (written, found) = lax.scan(one, x, (params, rest))
    # Only what was written: the parameters would come out of the scan as a second copy.
    values = [written.get(i, value) for i, value in enumerate(stacked)]
    nnx.update(block, *jax.tree.unflatten(jax.tree.structure((params, rest)), values))
    return y, Parts(graphdef, params, found)


def undo_stacked(config: Config, parts: Parts, y: Halves, dy: Halves) -> tuple[Halves, nnx.State]:
    """The cotangents of the input of the first of stacked blocks, and of their parameters.

    Args:
        config: how the blocks are applied.
        parts: those of all blocks, stacked.
        y: the output of the last, float32 or wider.
        dy: its cotangent, in the dtype of y.
    """

    def one(carry: tuple[Halves, Halves], layer: Any) -> tuple[Any, nnx.State]:
        x, dx, dparams = undo_block(config, Parts(parts.graphdef, *layer), *carry)
        return (x, dx), dparams

    (_, dx), dparams = lax.scan(one, (y, dy), (parts.params, parts.rest), reverse=True)
    return dx, dparams


def inverse_of_stacked(config: Config, block: Block, y: Halves) -> Halves:
    """The input of stacked blocks whose f and g hold no changing state.

    Args:
        config: how the blocks are applied.
        block: one block that holds the Variables of all.
        y: the output of the last, float32 or wider.
    """
    graphdef, *states = _split(block)

    def one(y: Halves, layer: list[nnx.State]) -> tuple[Halves, None]:
        return inverse_of_block(config, nnx.merge(graphdef, *layer, copy=True), y), None

    return lax.scan(one, y, states, reverse=True)[0]


def _split(block: Block) -> tuple[Any, nnx.State, nnx.State]:
    """A copy of a block as its graph, its floating Variables and the others."""
    copy = nnx.clone(block, graph=True)  # Written values do not reach it.
    return nnx.split(copy, _is_float, ..., graph=True)  # type: ignore[return-value]


def _is_float(path: Any, leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
