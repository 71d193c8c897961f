"""Reversible: residual blocks of two halves, computed backwards again from their output.

    forward   y1 = x1 + f(x2)                       for each block; x1, x2 are the halves of x
              y2 = x2 + g(y1)
    backward  x2 = y2 - g(y1),  e1 = dy1 + dy2 g'(y1)
              x1 = y1 - f(x2),  dx2 = dy2 + e1 f'(x2),  dx1 = e1
              dparams of g at dy2, of f at e1       JAX's VJP of each, called at the y1 and x2 found
    kept      the output of the last block, the parameters, and what else f and g hold, as it was
              before each was called

Every block's input follows from its output, so that of all the blocks one output is kept, however
many there are; autodiff keeps the activations of each. The backward calls every f and g once more.

What is subtracted was added with rounding, so an input comes back with an error of a few units in
the last place per block. The halves are therefore added up and kept in float32, or wider; f and g
are called with what they are in the dtype of x.

Source: arXiv:1707.04585
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.invertible.reversible_blocks import (
    Block,
    Config,
    Halves,
    apply_block,
    apply_stacked,
    cast,
    inverse_of_block,
    inverse_of_stacked,
    undo_block,
    undo_stacked,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import as_array, is_supported_float


class Residuals(NamedTuple):
    """What the backward of `reversible` keeps."""

    blocks: Any
    """The `Parts` of each block; of stacked ones, those of all as one."""
    y: Halves
    """In float32 or wider."""
    config: Config


@custom_vjp
def reversible(module: "Reversible", x: Halves) -> Halves:
    """Applies the blocks.

    Args:
        module: the blocks; f and g may write to their Variables.
        x: the two halves of the input, of one shape.

    Returns:
        The two halves of the output.
    """
    y = _apply(module, x)[0]
    return cast(y, x[0].dtype)


def _fwd(module: "Reversible", x: Halves) -> tuple[Halves, Residuals]:
    y, blocks, config = _apply(module, x)
    return cast(y, config.dtype), Residuals(blocks, y, config)


def _bwd(res: Residuals, dy: Halves) -> tuple[nnx.State, Halves]:
    chex.assert_equal_shape([*res.y, *dy])
    config, dy = res.config, cast(dy, res.y[0].dtype)
    if config.is_stacked:
        dx, dparams = undo_stacked(config, res.blocks, res.y, dy)
        chex.assert_trees_all_equal_shapes(dparams, res.blocks.params)
        grads = nnx.State({"blocks": dparams})
    else:
        y, of_blocks = res.y, {}
        for i, parts in reversed(list(enumerate(res.blocks))):
            y, dy, of_blocks[i] = undo_block(config, parts, y, dy)
        dx, grads = dy, nnx.State({"blocks": of_blocks})
    chex.assert_equal_shape([*res.y, *dx])
    return grads, cast(dx, config.dtype)


reversible.defvjp(_fwd, _bwd)


def _apply(module: "Reversible", x: Halves) -> tuple[Halves, Any, Config]:
    """The output in float32 or wider, and the `Parts` of the blocks."""
    config = Config(module.length is not None, x[0].dtype)
    x = cast(x, accumulator(x[0]))
    if config.is_stacked:
        return *apply_stacked(config, module.blocks, x), config
    blocks = []
    for block in module.blocks:
        x, parts = apply_block(config, block, x)
        blocks.append(parts)
    return x, tuple(blocks), config


class Reversible(nnx.Module):
    """Residual blocks that keep one output for all of them, instead of their activations.

    The input is split into two halves along an axis; each block adds `f` of the second half to the
    first, then `g` of the new first half to the second. `f` and `g` are any Modules (or functions)
    that keep the shape of a half, such as attention and an MLP, each after a normalization. They
    may draw random numbers and write statistics: the backward calls them with the state that they
    had, and writes nothing.

    The blocks are given as a pair, as two lists of equal length, or stacked: made under `nnx.vmap`,
    every Variable with a first axis of `length`; these run in one `lax.scan`. Memory does not grow
    with the number of blocks, but for the parameters; the backward takes one more forward.

    Args:
        f: a Module, or a sequence of them, one for each block.
        g: likewise.
        length: how many blocks are stacked in `f` and `g`; None where they are not.
        axis: the axis that is split; it has an even size.

    Attributes:
        blocks: the blocks, each with `f` and `g`; or, where they are stacked, one block.
        length: how many blocks are stacked, or None.
        axis: the axis that is split.

    Raises:
        TypeError: `f` or `g` is not callable.
        ValueError: the sequences differ in length or are empty, or a Variable is not stacked.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = lambda rngs: nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.tanh)
        >>> model = fcg.Reversible(layer(nnx.Rngs(0)), layer(nnx.Rngs(1)))
        >>> x = jnp.ones((2, 8))
        >>> bool(jnp.allclose(model.inverse(model(x)), x))
        True

    Source: arXiv:1707.04585
    """

    def __init__(
        self,
        f: Callable[..., jax.Array] | Sequence[Callable[..., jax.Array]],
        g: Callable[..., jax.Array] | Sequence[Callable[..., jax.Array]],
        *,
        length: int | None = None,
        axis: int = -1,
    ):
        self.length = length
        self.axis = axis
        self.blocks: Any
        if length is None:
            self.blocks = nnx.List(Block(*pair) for pair in zip(*_listed(f, g), strict=True))
        else:
            self.blocks = Block(f, g)  # type: ignore[arg-type]
            _check_stacked(self.blocks, length)
        for block in self.blocks if length is None else [self.blocks]:
            for name, function in (("f", block.f), ("g", block.g)):
                if not callable(function):
                    raise TypeError(
                        f"Reversible: {name} is a {type(function).__name__}, not callable"
                    )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the blocks.

        Args:
            x: float array of any shape, of which `axis` has an even size.

        Returns:
            Array like x.

        Raises:
            TypeError: x is no real floating array.
            ValueError: the axis cannot be split, or an `f` or `g` changes the shape.
        """
        return jnp.concatenate(reversible(self, self._halves(x)), self.axis)

    def inverse(self, y: jax.Array) -> jax.Array:
        """The input that gives an output, for blocks that draw no random numbers.

        Args:
            y: float array, what a call returned.

        Returns:
            Array like y, with the rounding errors of the backward.

        Raises:
            TypeError: y is no real floating array.
            ValueError: the axis cannot be split.
        """
        blocks, halves = nnx.clone(self.blocks, graph=True), self._halves(y)
        config = Config(self.length is not None, halves[0].dtype)
        halves = cast(halves, accumulator(halves[0]))
        if config.is_stacked:
            halves = inverse_of_stacked(config, blocks, halves)
        else:
            for block in reversed(blocks):
                halves = inverse_of_block(config, block, halves)
        return jnp.concatenate(cast(halves, config.dtype), self.axis)

    def _halves(self, x: Any) -> Halves:
        x = as_array(x)
        if not is_supported_float(x):
            raise TypeError(
                "Reversible takes float16, bfloat16, float32 and float64, got "
                f"{getattr(x, 'dtype', type(x).__name__)}: cast it first"
            )
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] % 2:
            raise ValueError(
                f"Reversible splits axis {self.axis} into halves, and x has shape {x.shape}: that "
                "axis must exist and have an even size. To start from one stream, write "
                "jnp.concatenate([x, x], axis)"
            )
        x1, x2 = jnp.split(x, 2, self.axis)
        return x1, x2


def _listed(f: Any, g: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The functions of all blocks, where there may be one block."""
    sequences = [isinstance(half, list | tuple | nnx.List) for half in (f, g)]
    if not any(sequences):
        return [f], [g]
    if not all(sequences) or len(f) != len(g) or not f:
        raise ValueError(
            "Reversible: f and g are one Module each, or two sequences of as many Modules, got "
            f"{_counted(f)} and {_counted(g)}"
        )
    return f, g


def _counted(half: Any) -> str:
    return f"{len(half)} in a sequence" if isinstance(half, list | tuple | nnx.List) else "one"


def _check_stacked(block: Block, length: int) -> None:
    for path, leaf in nnx.to_flat_state(nnx.state(block)):
        if jnp.shape(leaf[...])[:1] != (length,):
            raise ValueError(
                f"Reversible: length={length}, but {'/'.join(map(str, path))} has shape "
                f"{jnp.shape(leaf[...])}: make f and g under nnx.vmap, so that every Variable has "
                "one element for each block along its first axis"
            )
