"""Optimizers beside a model whose parameters change: their state no longer fits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@contextmanager
def warn_of_stale_optimizers(model: Any) -> Iterator[None]:
    """Warns of an optimizer whose parameters are others when the context ends.

    Args:
        model: a tree of Modules, among them maybe optimizers.
    """
    optimizers = [
        node for _, node in nnx.iter_graph(model, graph=True) if isinstance(node, nnx.Optimizer)
    ]
    before = [_trained_shapes(model, optimizer) for optimizer in optimizers]
    yield
    for optimizer, shapes in zip(optimizers, before, strict=True):
        changed = sorted(dict(_trained_shapes(model, optimizer).items() ^ shapes.items()))
        if changed:
            warnings.warn(
                f"the parameters have changed that this {type(optimizer).__name__} was made for: "
                f"{', '.join(changed[:5])}{', ...' if changed[5:] else ''}. Make it anew: "
                "nnx.Optimizer(model, tx, wrt=nnx.Param)",
                stacklevel=5,
            )


def _trained_shapes(model: Any, optimizer: nnx.Optimizer) -> dict[str, str]:
    """The shape of each Variable that an optimizer updates, by path."""
    is_trained = nnx.filterlib.to_predicate(optimizer.wrt)
    return {
        "/".join(map(str, path)): str(jax.tree.map(jnp.shape, node[...]))
        for path, node in nnx.iter_graph(model, graph=True)
        if isinstance(node, nnx.Variable)
        and not isinstance(node, nnx.OptState)
        and is_trained(path, node)
    }
