"""The parts of a model, each called inside of a named scope: Modules, and functions by name.

What a model computes is traced as it is. Each Module of a copy carries its path, as one more static
attribute, which goes with it through `nnx.jit`, `nnx.scan` and `nnx.remat`. While the copy is
traced, the methods of its classes enter the scope of a Module that has a path; any other is called
as ever.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from flax_customgrad.model.functions import Ours, calling_by
from flax_customgrad.model.residual_readers import scope_name
from flax_customgrad.model.tree import held_functions, is_of_user, layers

_PATH = "fcg_path"
_CONTAINERS = (nnx.List, nnx.Dict)
_lock = threading.Lock()


class Part(NamedTuple):
    """What a scope is around.

    Attributes:
        kind: a Module, a function that one holds, or a function that one calls by name; or what
            `nnx.remat` is around, which has no scope of its own.
        path: the first path of the Module or of the held function; of a call that of the Module
            that it is in; of a remat what all that it holds have in common.
        name: of a call the name of the function.
    """

    kind: Literal["module", "function", "call", "remat"]
    path: str
    name: str = ""


class Parts:
    """The parts that were entered in traces of one model, each with its number.

    Attributes:
        order: the parts, in the order of their first call; the number of each is its index.
    """

    def __init__(self) -> None:
        self.order: list[Part] = []
        self._entered: list[tuple[Part, bool]] = []
        self._seen: set[Part] = set()

    @contextmanager
    def traced(self, model: Any, *, with_functions: bool) -> Iterator[set[Part]]:
        """Within it, each part of a model is called inside of its scope.

        Args:
            model: the model, which is changed: it is a copy.
            with_functions: whether functions that are called by name are ours.

        Returns:
            A context manager of the parts that are called.
        """
        self._seen = set()
        classes = set()
        for paths, module in layers(model):
            if not isinstance(module, _CONTAINERS):
                # As flax does: a class of the user may refuse attributes that it does not know.
                nnx.Module.__setattr__(module, _PATH, paths[0])
                classes.add(type(module))
        for held in held_functions(model):
            part = Part("function", held.paths[0])
            held.replace(functools.wraps(held.function)(self._in_scope(part, held.function)))
        with _lock, self._methods_in_scopes(classes), calling_by(_Scoped(self, with_functions)):
            yield self._seen

    @contextmanager
    def scope(
        self, part: Part, *, is_of_library: bool = False, is_call: bool = True
    ) -> Iterator[None]:
        """The scope of a part.

        Args:
            part: the part.
            is_of_library: whether it is a layer of flax.nnx or of this library.
            is_call: whether it computes what it is for: any method may be called, such as one that
                tells shapes.
        """
        if part not in self.order:
            self.order.append(part)
        if is_call:
            self._seen.add(part)
        self._entered.append((part, is_of_library))
        try:
            with jax.named_scope(scope_name(self.order.index(part))):
                yield
        finally:
            self._entered.pop()

    def caller(self) -> str | None:
        """The path of the Module that runs; None where a layer of flax.nnx or of ours does."""
        part, is_of_library = self._entered[-1] if self._entered else (Part("module", ""), False)
        return None if is_of_library else part.path

    def _in_scope(self, part: Part, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.scope(part):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def _methods_in_scopes(self, classes: set[type]) -> Iterator[None]:
        """Has the public methods of classes enter the scope of their Module."""
        of_modules = set(nnx.Module.__mro__)
        bases = {base for cls in classes for base in cls.__mro__ if base not in of_modules}
        before = [
            (base, name, method)
            for base in bases
            for name, method in vars(base).items()
            if name == "__call__" or (inspect.isfunction(method) and not name.startswith("_"))
        ]
        try:
            for base, name, method in before:
                setattr(base, name, self._scoped_method(method))
            yield
        finally:
            for base, name, method in before:
                setattr(base, name, method)

    def _scoped_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = vars(module).get(_PATH)
            if path is None:
                return method(module, *args, **kwargs)
            part, is_of_library = Part("module", path), not is_of_user(type(module))
            is_call = method.__name__ == "__call__"
            with self.scope(part, is_of_library=is_of_library, is_call=is_call):
                return method(module, *args, **kwargs)

        return call


class _Scoped(Ours):
    """How a function is called by name: inside of its scope, as it is or ours."""

    def __init__(self, parts: Parts, with_functions: bool):
        self._parts = parts
        self._with_functions = with_functions

    def __call__(self, function: Any, ours: Any, caller: str, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        call = function
        if self._with_functions:
            call = functools.partial(super().__call__, function, ours, caller)
        path = self._parts.caller()
        # What a layer of flax.nnx or of ours calls belongs to the layer.
        if path is None or not caller:
            return call(*args, **kwargs)
        with self._parts.scope(Part("call", path, f"fcg.{ours.__name__}")):
            return call(*args, **kwargs)
