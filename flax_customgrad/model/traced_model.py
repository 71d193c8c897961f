"""A model as a pure function of trees of arrays, in each of its forms, to be traced by JAX."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from flax_customgrad.model.convert import convert, revert


class TracedModel:
    """What is called in a trace: a model on its inputs, or a function of both.

    Args:
        call: a function of the model and its inputs; `model(*inputs, **keywords)` by default.
        inputs: trees of arrays, of their shapes and dtypes, and of other values, which are static.
        keywords: the same, passed by name.
    """

    def __init__(
        self,
        call: Callable[..., Any] | None,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any] | None = None,
    ):
        leaves, self._tree = jax.tree.flatten((inputs, dict(keywords or {})))
        self._call = call or (lambda model, *inputs, **keywords: model(*inputs, **keywords))
        self._static = {i: a for i, a in enumerate(leaves) if not hasattr(a, "dtype")}
        self._arrays = {i: a for i, a in enumerate(leaves) if hasattr(a, "dtype")}

    def function(self, model: Any) -> tuple[Any, ...]:
        """A pure function of trees of arrays, which returns a list of arrays; and the trees.

        Args:
            model: the model, in any of its forms. It is not changed.
        """
        graphdef, state = nnx.split(model, graph=True)

        def pure(state: nnx.State, arrays: Mapping[int, Any]) -> list[Any]:
            leaves = [value for _, value in sorted({**self._static, **arrays}.items())]
            inputs, keywords = jax.tree.unflatten(self._tree, leaves)
            out = self._call(nnx.merge(graphdef, state), *inputs, **keywords)
            return [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]

        return pure, state, self._arrays


def both_forms(model: Any) -> tuple[Any, Any]:
    """Copies of a model: one with the layers of flax.nnx, and one that is converted.

    Args:
        model: a Module, or a tree of Modules, converted or not. It is not changed.
    """
    theirs, ours = nnx.clone(model, graph=True), nnx.clone(model, graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return revert(theirs), convert(ours)
