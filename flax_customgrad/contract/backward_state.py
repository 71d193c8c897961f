"""`BackwardState`: state of a layer that its backward pass reads and writes.

A Variable cannot be written in a backward: NNX hands the rules of a custom gradient a copy, and
what they write there is lost. A `jax.Ref` can, and JAX keeps its reads and writes in order. The
state holds one, and to NNX it is a static attribute: a Ref among the leaves of a module is
something that `nnx.grad(graph=False)` would differentiate (jax 0.12 refuses), that `nnx.jit` may
not return, and that a Variable around it drops.

    nnx.split, nnx.state    it is part of the graphdef, and no part of the State
    nnx.merge, nnx.clone    the new module shares it with the old one
    copy.deepcopy           the copy has a state of its own, with the same value
    checkpoints             `backward_state` and `load_backward_state`
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract import compat


class BackwardStateError(RuntimeError):
    """A `BackwardState` has no value yet, or is written where JAX cannot write it."""


class BackwardState:
    """An array that a backward pass may write: a running maximum of gradients, a counter.

    An operation of `custom_vjp` takes it as an argument, by itself or in the Module that holds it.
    Its fwd keeps it in the residuals, its bwd reads it as `state[...]` and writes it as
    `state[...] = value`; its cotangent is None. What is written reaches the layer of the caller:
    through `nnx.grad`, `nnx.jit` and `nnx.remat` in every mode of NNX, `jax.jit(jax.grad)` of a
    merged module, `lax.scan` over steps or over calls. Two calls of a layer are two writes, one
    after the other, in the order in which JAX runs the backward passes.

    What JAX cannot do is an error, never a lost write. Under `jax.vmap` a write raises
    `BackwardStateError`: give the layer the batch itself, or reduce over the batch outside.
    `jax.shard_map` takes no Ref that it closes over, nor does the gradient of a `lax.cond` with
    jax before 0.12 (`KeyError: AbstractRef`): choose with `jnp.where` there.

    A layer that is made inside a transformation (`nnx.eval_shape`, `nnx.jit`, `nnx.vmap`) has a
    state without a value, which raises when it is read: give it one with `load_backward_state` or
    `reset_backward_state`.

    Args:
        value: the initial value, an array of any shape. On a mesh, make the layer inside
            `jax.set_mesh(mesh)`: the state lives on all of its devices then.
        name: how errors call it.

    Attributes:
        name: how errors call it.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> @fcg.custom_vjp
        ... def watch(x, history):
        ...     return x
        >>> def watch_fwd(x, history):
        ...     return x, history
        >>> def watch_bwd(history, g):
        ...     history[...] = jnp.roll(history[...], 1).at[0].set(jnp.abs(g).max())
        ...     return g, None
        >>> watch.defvjp(watch_fwd, watch_bwd)
        >>> class Watch(nnx.Module):
        ...     '''Remembers the largest gradient of each of the last steps.'''
        ...
        ...     def __init__(self, steps):
        ...         self.history = fcg.BackwardState(jnp.zeros(steps))
        ...
        ...     def __call__(self, x):
        ...         return watch(x, self.history)
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Watch(4))
        >>> step = nnx.jit(nnx.grad(lambda model, x, scale: scale * model(x).sum()))
        >>> for scale in (1.0, 3.0):
        ...     grads = step(model, jnp.ones((5, 2)), scale)
        >>> model.layers[1].history[...]
        Array([3., 1., 0., 0.], dtype=float32)
    """

    def __init__(self, value: Any, *, name: str = "a BackwardState"):
        self.name = name
        known = not compat.is_traced(value) and not isinstance(value, jax.ShapeDtypeStruct)
        self._type = jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))
        self._initial = np.asarray(value) if known else None
        # What a trace makes is its own, and a compiled constructor hands out one object each time.
        self._ref = (
            jax.new_ref(jnp.asarray(value)) if known and compat.is_outside_of_traces() else None
        )
        self._origin = self

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._type.shape

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self._type.dtype

    @property
    def has_value(self) -> bool:
        """Whether it has a value: it was made outside of transformations, or was given one."""
        return self._ref is not None

    @property
    def ref(self) -> jax.Ref:
        """The `jax.Ref` that holds its value.

        Raises:
            BackwardStateError: it was made inside a transformation and has no value yet.
        """
        if self._ref is None:
            raise BackwardStateError(
                f"{self} has no value: its layer was made inside a transformation, such as "
                "nnx.eval_shape, nnx.jit or nnx.vmap. Call "
                "flax_customgrad.reset_backward_state(model) for its initial value, or "
                "load_backward_state(model, values) for saved ones, outside of it"
            )
        return self._ref

    def __getitem__(self, index: Any) -> jax.Array:
        """Reads: `state[...]` is all of it."""
        return self.ref[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Writes: `state[...] = value` all of it. The value carries no gradient.

        Raises:
            BackwardStateError: under `jax.vmap`.
        """
        try:
            self.ref[index] = jax.lax.stop_gradient(value)
        except Exception as error:
            if not compat.is_unbatched_write_error(error):
                raise
            raise BackwardStateError(
                f"{self} is written under jax.vmap, where one state would get a value per example "
                "and JAX writes none: call the layer on the whole batch, whose axes come first, "
                "and not under vmap"
            ) from error

    def __repr__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"

    # Inside an operation the same state stands for a Ref of the trace.

    def bound(self, ref: jax.Ref) -> "BackwardState":
        """This state as an operation sees it: it reads and writes a Ref of the trace.

        Args:
            ref: stands for the Ref of this state.
        """
        view = copy.copy(self)
        view._ref = ref
        return view

    def __hash__(self) -> int:
        return id(self._origin)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, BackwardState) and self._origin is other._origin

    def __deepcopy__(self, memo: dict[int, Any]) -> "BackwardState":
        return self._with_value(self._type if self._ref is None else self[...])

    def _with_value(self, value: Any) -> "BackwardState":
        """Another state, for the same purpose and with the same initial value."""
        other = BackwardState(value, name=self.name)
        other._initial = self._initial
        return other


Values = nnx.State
"""The values of the states of a model: nested like the model, by attribute name and index."""


def backward_state(model: Any) -> Values:
    """The values of every `BackwardState` of a model, for a checkpoint.

    They are no part of `nnx.state(model)`. Save them beside it, and restore both::

        checkpointer.save(path, {"model": nnx.state(model), "backward": fcg.backward_state(model)})

    Args:
        model: a Module, or a tree of them.

    Returns:
        An `nnx.State` of arrays, nested like the model; of shapes and dtypes for what has no value
        yet, so that an abstract model says what to restore.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Fp8Linear(4, 3, history=2, rngs=nnx.Rngs(0))
        >>> fcg.backward_state(layer)['delayed']['scale']
        Array([1., 1., 1.], dtype=float32)
    """
    found = _found(model)
    values = [(path, s._type if s._ref is None else s[...]) for path, s in found.items()]
    return nnx.from_flat_state(values)


def load_backward_state(model: Any, values: Any) -> None:
    """Gives every `BackwardState` of a model a value, in place.

    Compiled functions of the model go on to use the states, except where a state gets its first
    value or moves to other devices.

    Args:
        model: a Module, or a tree of them.
        values: what `backward_state` returned for a model of this structure, with other arrays; a
            nested dict will do. To move the states to a mesh, load arrays that live there.

    Raises:
        ValueError: a value is missing, or there is one too many, or its shape is another.
        BackwardStateError: inside a transformation.
    """
    _check_outside("load_backward_state")
    _stack(model)
    found = _found(model)
    given = dict(_flat(values))
    paths = {tuple(map(str, path)): path for path in found}
    for path in given.keys() ^ paths.keys():
        what = "is missing from" if path in paths else "is no state of the model, but is in"
        raise ValueError(f"load_backward_state: {'.'.join(path)} {what} the values")
    for path, value in given.items():
        state = found[paths[path]]
        if jnp.shape(value) != state.shape:
            raise ValueError(
                f"load_backward_state: {'.'.join(path)} has shape {jnp.shape(value)}; expected "
                f"{state.shape}, the shape of {state}"
            )
    for path, value in given.items():
        _set(model, paths[path], found[paths[path]], value)


def reset_backward_state(model: Any) -> None:
    """Gives every `BackwardState` of a model its initial value, in place.

    It is how a model that `nnx.jit` has made, on a mesh for example, gets its states. Layers that
    `nnx.vmap` has stacked share one state, unless they have a method `stack_backward_state`, which
    is called first and may replace it by one with a part for each layer.

    Args:
        model: a Module, or a tree of them.

    Raises:
        BackwardStateError: inside a transformation; or an initial value is not known, because it
            was computed inside of one: make it with NumPy.
    """
    _check_outside("reset_backward_state")
    _stack(model)
    found = _found(model)
    for path, state in found.items():
        if state._initial is None:
            raise BackwardStateError(
                f"the initial value of {'.'.join(map(str, path))} was computed inside a "
                "transformation and is not known here: make it with NumPy, "
                "BackwardState(np.zeros(16, np.float32))"
            )
    for path, state in found.items():
        _set(model, path, state, state._initial)


def states_of(module: Any) -> Iterator[tuple[tuple[Any, ...], BackwardState]]:
    """The states that a model holds, and their paths.

    Args:
        module: a Module, or a tree of them.
    """
    for path, value in nnx.iter_graph(module, graph=True):
        if isinstance(value, BackwardState):
            yield tuple(path), value


def put(module: Any, path: tuple[Any, ...], state: BackwardState) -> None:
    """Puts a state in the place of another.

    Args:
        module: the Module that holds it.
        path: where.
        state: the new one.
    """
    *parents, last = path
    module = at(module, parents)
    if _is_attribute(module, last):
        setattr(module, last, state)
    else:
        module[last] = state


def _stack(model: Any) -> None:
    """Lets stacked layers have a state each; inside of `nnx.vmap` they did not know how many."""
    for _, node in list(nnx.iter_graph(model, graph=True)):
        stack = getattr(node, "stack_backward_state", None)
        if stack is not None:
            stack()


def at(module: Any, path: Iterable[Any]) -> Any:
    """What a Module holds at a path.

    Args:
        module: the Module.
        path: names of attributes, and indices.
    """
    for key in path:
        module = getattr(module, key) if _is_attribute(module, key) else module[key]
    return module


def _is_attribute(module: Any, key: Any) -> bool:
    return isinstance(module, nnx.Pytree) and isinstance(key, str)


def _found(model: Any) -> dict[tuple[Any, ...], BackwardState]:
    """The states by path, each once."""
    found: dict[BackwardState, tuple[Any, ...]] = {}
    for path, state in states_of(model):
        found.setdefault(state, path)
    return {path: state for state, path in found.items()}


def _flat(values: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values by path; a checkpoint may have made strings of indices."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from (((str(key), *path), leaf) for path, leaf in _flat(value))
        else:
            yield (str(key),), value


def _set(model: Any, path: tuple[Any, ...], state: BackwardState, value: Any) -> None:
    value = jnp.asarray(value, state.dtype)
    if state._ref is not None and _is_like(value, state[...]):
        state[...] = value
        return
    # A compiled function holds the Ref that it was traced with: it has to see another state.
    other = state._with_value(value)
    for where, held in list(states_of(model)):
        if held == state:
            put(model, where, other)


def _is_like(value: jax.Array, held: jax.Array) -> bool:
    """Whether a value lives where another does; one that is not committed goes anywhere."""
    return not value.committed or value.sharding.is_equivalent_to(held.sharding, held.ndim)


def _check_outside(name: str) -> None:
    if not compat.is_outside_of_traces():
        raise BackwardStateError(f"{name} is called inside a transformation: call it outside")
