"""The Modules of a model, and the functions that they hold, with the paths to them."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from flax_customgrad.model.functions import original_of

Paths = tuple[str, ...]


def layers(model: Any) -> list[tuple[Paths, nnx.Module]]:
    """Lists the Modules of a model, each once, with every path at which it is held.

    Args:
        model: a Module, or a tree of Modules.

    Returns:
        Pairs of paths and Module. A path is made of attribute names and indices, `layers/0`; that
        of the model itself is empty.

    Raises:
        TypeError: the model holds no Module.
    """
    found = [(paths, node) for paths, node in _nodes(model) if isinstance(node, nnx.Module)]
    if not found:
        raise TypeError(f"expected a Module or a tree of Modules, got {type(model).__name__}")
    return found


def set_mode(model: Any, mode: Literal["train", "eval"]) -> None:
    """Calls `train` or `eval` of every Module of a model, also of those that override it.

    Args:
        model: a Module, or a tree of Modules.
        mode: the name of the method.
    """
    # Layers may be shared, which a tree may not hold.
    with nnx.set_graph_mode(True):
        for _, module in layers(model):
            getattr(module, mode)()


def path_order(path: str) -> list[tuple[int, str]]:
    """A sort key for paths that puts layer 2 before layer 10."""
    return [(int(p) if p.isdigit() else 0, p) for p in path.split("/")]


def children(node: Any) -> list[tuple[Any, Any]]:
    """The children of a node, by index, key or attribute name."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else []


@dataclass(frozen=True)
class HeldFunction:
    """A function that a Module holds, as an attribute or in a container that is one.

    Attributes:
        paths: every path at which it is held, such as `blocks/0/act`.
        holder: the Module; in a model that is a list or dict, that.
        keys: the way from the holder to the function: the name of an attribute, then indices and
            keys of containers, names of fields, and "func" into a `functools.partial`.
        function: the function.
    """

    paths: Paths
    holder: Any
    keys: tuple[Any, ...]
    function: Callable[..., Any]

    def replace(self, function: Callable[..., Any]) -> None:
        """Puts another function in its place.

        A tuple, a partial or a dataclass on the way is built anew: other models may hold it.

        Args:
            function: the other function.
        """
        name, *keys = self.keys
        held = dict(children(self.holder))[name]
        new = _with_item(held, keys, function)
        if new is held:
            return
        if isinstance(self.holder, list | dict):
            self.holder[name] = new
        else:
            setattr(self.holder, str(name), new)

    @property
    def is_in_config(self) -> bool:
        """Whether it is a field of a dataclass, such as a config."""
        return any(isinstance(key, _Field) for key in self.keys)


def held_functions(model: Any) -> list[HeldFunction]:
    """Lists the functions that the Modules of a model hold.

    Those that belong to a layer of flax.nnx or of this library are left out, such as the
    `attention_fn` of a MultiHeadAttention: a drop-in knows the defaults of nnx itself. So are
    classes, and methods of Modules.

    Args:
        model: a Module, or a tree of Modules.

    Returns:
        One entry for each place that holds a function. What `flax_customgrad.functions` has put
        into a namespace counts as the function that it stands for.
    """
    found = []
    for paths, holder in _nodes(model):
        for name, value in _own_attributes(model, holder):
            for keys, function in _functions_in(value):
                # A partial is one thing with its function: its "func" is in no path.
                tail = [str(key) for key in (name, *keys) if key is not _FUNC]
                places = tuple("/".join([path, *tail] if path else tail) for path in paths)
                found.append(HeldFunction(places, holder, (name, *keys), function))
    return found


class _Field(str):
    """The name of a field of a dataclass."""


_FUNC = "func"
_CONTAINERS = (nnx.List, nnx.Dict, nnx.Sequential)


def _nodes(model: Any) -> list[tuple[Paths, Any]]:
    """The nodes of a model, Modules and containers, each once, with every path."""
    nodes = {id(node): (path, node) for path, node in nnx.iter_graph(model, graph=True)}
    paths: dict[int, list[tuple[Any, ...]]] = {key: [path] for key, (path, _) in nodes.items()}
    for path, node in nodes.values():
        for key, child in children(node):
            if id(child) in paths and (*path, key) not in paths[id(child)]:
                paths[id(child)].append((*path, key))
    return [
        (tuple("/".join(map(str, path)) for path in paths[key]), node)
        for key, (_, node) in nodes.items()
    ]


def _own_attributes(model: Any, node: Any) -> list[tuple[Any, Any]]:
    """What a Module of a user holds by its own choice, beside the arguments of a layer of nnx."""
    if not isinstance(node, nnx.Pytree):
        return children(node) if node is model and isinstance(node, list | dict) else []
    bases = [base for base in type(node).__mro__ if not is_of_user(base)]
    if bases[0] is type(node) and not isinstance(node, _CONTAINERS):
        return []
    of_nnx = {name for base in bases for name in _arguments_of(base)}
    return [
        (name, value)
        for name, value in children(node)
        if name not in of_nnx and not str(name).startswith("_pytree__")
    ]


@functools.cache
def _arguments_of(cls: type) -> frozenset[str]:
    """The names of the arguments that a class is made with."""
    is_layer = issubclass(cls, nnx.Module) and cls not in (nnx.Module, *_CONTAINERS)
    return frozenset(inspect.signature(cls.__init__).parameters) if is_layer else frozenset()


def is_of_user(cls: type) -> bool:
    """Whether a class is neither of flax nor of this library, whose command line is a user too."""
    package = cls.__module__.partition(".")[0]
    is_of_command = cls.__module__.startswith("flax_customgrad.command.")
    return is_of_command or package not in ("flax", "flax_customgrad", "builtins")


def _functions_in(value: Any) -> Iterator[tuple[tuple[Any, ...], Callable[..., Any]]]:
    """The functions in what a Module holds, each with the keys that lead to it."""
    if isinstance(value, functools.partial):
        inside: list[tuple[Any, Any]] = [(_FUNC, value.func)]
    elif isinstance(value, list | tuple | dict):
        inside = children(value)
    elif _is_config(value):
        fields = (_Field(field.name) for field in dataclasses.fields(value))
        inside = [(name, getattr(value, name, None)) for name in fields]
    else:
        function = original_of(value)
        owner = getattr(function, "__self__", None)
        no_functions = type | nnx.Pytree | nnx.Variable
        if callable(function) and not any(isinstance(a, no_functions) for a in (function, owner)):
            yield (), function
        return
    for key, item in inside:
        for keys, function in _functions_in(item):
            yield (key, *keys), function


def _is_config(value: Any) -> bool:
    """Whether a value is a dataclass that is neither a class nor a Module."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | nnx.Pytree)


def _with_item(value: Any, keys: Sequence[Any], new: Any) -> Any:
    """What a Module holds, with a function in it replaced; lists and dicts are changed in place."""
    if not keys:
        return new
    key, *rest = keys
    if isinstance(value, functools.partial):
        func = _with_item(value.func, rest, new)
        return functools.partial(func, *value.args, **_known_keywords(func, value.keywords))
    if isinstance(key, _Field):
        copied = copy.copy(value)
        # Not `dataclasses.replace`, which runs a constructor again; and a config may be frozen.
        object.__setattr__(copied, key, _with_item(getattr(value, key), rest, new))
        return copied
    item = _with_item(value[key], rest, new)
    if not isinstance(value, tuple):
        value[key] = item
        return value
    items = (item if k == key else old for k, old in enumerate(value))
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _known_keywords(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a function takes: flax.nnx has none for what a backward keeps."""
    taken = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in taken}
