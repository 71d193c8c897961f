"""A function under test, as pure functions of arrays, to which every transform of JAX applies.

The arguments (modules, States, arrays, static values) are packed into a list of arrays. What is
compared is the gradient of one number, a weighted sum of sines of the output: its second
derivatives vanish for no argument, and every element has a weight of its own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.arguments import (
    PackedTree,
    Position,
    by_path,
    is_parameters,
    pack_tree,
)
from flax_customgrad.contract.autodiff import use_autodiff

Gradient = tuple[Any, ...]


@dataclass
class Problem:
    """A function, a reference for it, and arguments in one dtype.

    Attributes:
        fn: the function whose gradient is checked; takes the arguments.
        reference: a function of the same arguments, whose derivative by autodiff is expected.
        args: the arguments.
        arrays: the arrays among them.
        packed: the arguments without their arrays.
        names: the name of each array, such as "m.kernel".
        differentiable: positions of the arrays that have a gradient.
        parameters: positions of the arrays that belong to a Module, State or dict.
        is_surrogate: the gradient is meant to differ from the derivative of the value.
    """

    fn: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    arrays: list[jax.Array]
    packed: PackedTree
    names: list[str]
    differentiable: tuple[int, ...]
    parameters: tuple[int, ...]
    is_surrogate: bool = False

    @classmethod
    def make(
        cls,
        fn: Callable[..., Any],
        reference: Callable[..., Any] | None,
        args: tuple[Any, ...],
        arg_names: Sequence[str],
        dtype: Any,
        is_surrogate: bool = False,
    ) -> "Problem":
        """Converts the arguments to a dtype and separates the arrays from the rest.

        Args:
            fn: the function under test.
            reference: the reference; None for `fn` under `use_autodiff`.
            args: its arguments.
            arg_names: their names.
            dtype: dtype for each floating array and for each `dtype` that a layer was given.
            is_surrogate: the gradient is meant to differ from the derivative of the value. What
                a layer holds beside its Params, such as the mask of a kernel, then has none.
        """
        args = tuple(cast_argument(arg, dtype) for arg in args)
        arrays, packed = pack_tree(args, "an argument")
        arrays = [jnp.asarray(a) if isinstance(a, np.ndarray | np.generic) else a for a in arrays]
        names = [""] * len(arrays)
        differentiable, parameters = [], []
        for arg, name in zip(packed.positions(), arg_names, strict=True):
            leaves = list(by_path(arg) if is_parameters(arg) else [((), arg)])
            has_params = any(isinstance(leaf, nnx.Param) for _, leaf in leaves)
            for path, leaf in leaves:
                # Statistics and counters are Variables but not Params: they have no gradient.
                is_param = isinstance(leaf, nnx.Param)
                fixed = not is_param and (
                    isinstance(leaf, nnx.Variable) or (is_surrogate and has_params)
                )
                # A static number is a leaf as well, but not a position.
                for position in (p for p in jax.tree.leaves(leaf) if isinstance(p, Position)):
                    names[position] = ".".join(map(str, (name, *path))).lstrip(".")
                    if is_parameters(arg):
                        parameters.append(int(position))
                    if not fixed and jnp.issubdtype(arrays[position].dtype, jnp.floating):
                        differentiable.append(int(position))
        return cls(
            fn,
            reference or _by_autodiff(fn),
            args,
            arrays,
            packed,
            names,
            tuple(sorted(differentiable)),
            tuple(sorted(parameters)),
            is_surrogate,
        )

    def at(self, arrays: Sequence[jax.Array]) -> "Problem":
        """The same problem for other arrays, such as those of a trace."""
        return replace(self, arrays=list(arrays), args=self.packed.unpack(arrays))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Positions of the arrays that are not parameters: those that differ within a batch."""
        return tuple(i for i in range(len(self.arrays)) if i not in self.parameters)

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as a function of the arrays."""
        return lambda *arrays: fn(*self.packed.unpack(arrays))

    def value(self, fn: Callable[..., Any]) -> Gradient:
        """What `fn` returns for the arrays, as a flat tuple."""
        return tuple(jax.tree.leaves(self.apply(fn)(*self.arrays)))

    def objective(self, fn: Callable[..., Any]) -> Callable[..., jax.Array]:
        """A scalar function of the arrays: the weighted sum of sines of what `fn` returns."""
        return lambda *arrays: weigh(self.apply(fn)(*arrays))

    def gradient(self, fn: Callable[..., Any]) -> Callable[..., Gradient]:
        """The gradient of `objective`, as a function of the arrays."""
        return jax.grad(self.objective(fn), argnums=self.differentiable)

    def linear_gradient(self, fn: Callable[..., Any]) -> Callable[..., Gradient]:
        """The gradient for a cotangent that every dtype holds exactly."""
        return jax.grad(
            lambda *arrays: weigh_linearly(self.apply(fn)(*arrays)), argnums=self.differentiable
        )

    def of_differentiable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as a function of the arrays that have a gradient, the others fixed."""
        return lambda *values: fn(*replaced(self.arrays, self.differentiable, values))

    def outputs(self, fn: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
        """The floating outputs of `fn`, as a function of the arrays that have a gradient."""
        return self.of_differentiable(lambda *arrays: floating(self.apply(fn)(*arrays)))

    @property
    def values(self) -> tuple[jax.Array, ...]:
        """The arrays that have a gradient."""
        return tuple(self.arrays[i] for i in self.differentiable)

    def directions(self, seed: int) -> tuple[jax.Array, ...]:
        """A random direction for each array that has a gradient."""
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in self.values)

    @functools.cached_property
    def expected_gradient(self) -> Callable[..., Gradient]:
        """The gradient of the reference, compiled once for all checks."""
        return jax.jit(self.gradient(self.reference))

    @functools.cached_property
    def expected_value(self) -> Gradient:
        """What the reference returns for the arrays, as a flat tuple."""
        return self.value(self.reference)

    @functools.cached_property
    def expected(self) -> Gradient:
        """The gradient of the reference for the arrays themselves."""
        return self.expected_gradient(*self.arrays)

    @functools.cached_property
    def cotangent(self) -> list[jax.Array]:
        """The gradient of `objective` with respect to each floating output, at the expected one."""
        return jax.grad(weigh)(floating(self.expected_value))

    def batch(self, size: int, positions: Sequence[int], seed: int) -> list[jax.Array]:
        """The arrays, with those at `positions` stacked `size` times with different values."""
        return [
            _stack(a, size, np.random.default_rng([seed, i])) if i in positions else a
            for i, a in enumerate(self.arrays)
        ]


def replaced(
    arrays: Sequence[jax.Array], positions: Sequence[int], values: Sequence[jax.Array]
) -> list[jax.Array]:
    """The arrays, with other values at some positions."""
    result = list(arrays)
    for position, value in zip(positions, values, strict=True):
        result[position] = value
    return result


def weigh(out: Any) -> jax.Array:
    """A number that depends on every element of an output in a different way."""
    total = jnp.zeros(())
    for leaf in floating(out):
        weights = np.cos(1.0 + np.arange(leaf.size)).reshape(leaf.shape)
        total += jnp.sum(jnp.sin(leaf) * weights.astype(leaf.dtype)).astype(total.dtype)
    return total


def weigh_linearly(out: Any) -> jax.Array:
    """A sum of an output's elements times whole numbers from -60 to 190, divided by 4096.

    Every dtype holds these weights exactly, and none of two bytes the sum of many of them. Their
    mean is not zero, so that a sum over rows grows with each row; divided, it stays far below the
    largest float16.
    """
    total = jnp.zeros(())
    for leaf in floating(out):
        weights = ((89 * np.arange(leaf.size) % 251 - 60.0) / 4096).reshape(leaf.shape)
        total += jnp.sum(leaf.astype(total.dtype) * weights)
    return total


def floating(out: Any) -> list[jax.Array]:
    """The floating arrays of an output."""
    return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def cast_argument(arg: Any, dtype: Any) -> Any:
    """An argument with its floating arrays, and the `dtype` of its layers, in another dtype."""
    if isinstance(arg, nnx.Module):
        arg = nnx.clone(arg)
        for _, node in nnx.iter_graph(arg, graph=True):
            for name in ("dtype", "preferred_element_type"):
                if isinstance(node, nnx.Module) and getattr(node, name, None) is not None:
                    setattr(node, name, dtype)
        graphdef, state = nnx.split(arg, graph=True)
        state = jax.tree.map(
            lambda v: _cast_variable(v, dtype), state, is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
        return nnx.merge(graphdef, state)
    return jax.tree.map(lambda a: _cast(a, dtype), arg)


def _by_autodiff(fn: Callable[..., Any]) -> Callable[..., Any]:
    def reference(*args: Any) -> Any:
        with use_autodiff():
            return fn(*args)

    return reference


def _cast(array: Any, dtype: Any, narrow: bool = True) -> Any:
    """A floating array in another dtype, anything else as it is."""
    is_array = isinstance(array, jax.Array | np.ndarray)
    if not (is_array and jnp.issubdtype(array.dtype, jnp.floating)):
        return array
    dtype = jnp.dtype(dtype) if narrow else jnp.promote_types(array.dtype, dtype)
    # NumPy compiles no program for it.
    return jax.device_put(np.asarray(array).astype(dtype))


def _cast_variable(variable: Any, dtype: Any) -> Any:
    """A Variable in another dtype; statistics, which are not Params, are never narrowed."""
    narrow = isinstance(variable, nnx.Param) or not isinstance(variable, nnx.Variable)
    return jax.tree.map(lambda array: _cast(array, dtype, narrow), variable)


def _stack(array: jax.Array, size: int, rng: np.random.Generator) -> jax.Array:
    """Copies of an array: floats with other values near them, anything else as it is."""
    copies = jnp.stack([array] * size)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return copies
    noise = 0.1 * rng.standard_normal((size, *array.shape))
    return copies + jnp.asarray(noise, array.dtype)
