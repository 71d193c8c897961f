"""`functions`: within it, functions that a model calls by name are those of this library.

A namespace such as `flax.nnx` belongs to all threads. So what is put there for a function, while
anyone is inside, decides at each call: ours on a thread that is inside, and the function that was
there on any other. JAX's caches know of the context, and trace a function anew inside of it. After
the last exit every namespace holds what it held before.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

NAMESPACES = (
    "flax.nnx",
    "flax.nnx.nn.activations",
    "flax.nnx.nn.attention",
    "jax.nn",
    "jax.scipy.special",
)
"""Where functions are looked up; not `jax.numpy`, whose names JAX's own functions call."""

_PACKAGE = __name__.partition(".")[0]


class Ours:
    """How a function is called by name inside of `functions`: ours in its place."""

    def __call__(self, function: Any, ours: Any, caller: str, *args: Any, **kwargs: Any) -> Any:
        """Calls ours.

        Args:
            function: the function of flax.nnx or jax.nn.
            ours: that of this library.
            caller: the qualified name of who calls it; "" where that is this library.
            *args: the arguments.
            **kwargs: the arguments.
        """
        # Ours calls functions of JAX, which may be looked up where this one was.
        with _context(None):
            return ours(*args, **kwargs)


class Calls:
    """Functions that were called by name, as they are.

    Attributes:
        counts: how often each was called by whom; keys are (function, name of the caller).
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[Any, str]] = Counter()

    def __call__(self, function: Any, ours: Any, caller: str, *args: Any, **kwargs: Any) -> Any:
        """Counts the call."""
        if caller:
            self.counts[function, caller] += 1
        return function(*args, **kwargs)


# What calls a function that was called by name; None outside of all contexts.
_context = jax.make_user_context(default_value=None)
_OURS = Ours()


@contextmanager
def functions() -> Iterator[None]:
    """Makes functions of flax.nnx and jax.nn that are called by name those of this library.

    `convert` reaches what a layer holds, and not the `nnx.gelu` or `jax.nn.softmax` in somebody's
    `__call__`. Inside of this context these names, and those of every other function that has a
    drop-in, mean `fcg.gelu` and `fcg.softmax`. So do they in layers of nnx that were not converted.

    A name that was imported before, `from jax.nn import gelu`, is not reached: replace it by hand,
    or write `nnx.gelu`. `jnp.tanh` stays; `nnx.tanh` and `jax.nn.tanh` are ours.

    Returns:
        A context manager, or a decorator of a function, such as a step of training. It acts on the
        thread that enters it, and on what is traced in it; the gradient may be taken outside.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> def block(x):
        ...     return nnx.gelu(2 * x)
        >>> before = fcg.residual_bytes(block, jnp.ones(1024))
        >>> with fcg.functions():
        ...     after = fcg.residual_bytes(block, jnp.ones(1024))
        >>> before > 3 * after
        True
    """
    with calling_by(_OURS):
        yield


@contextmanager
def counting_calls() -> Iterator[Calls]:
    """Counts the functions with a drop-in that are called by name, and calls them as they are.

    Returns:
        A context manager; the counts are complete when it ends. Everything in it is traced anew.
    """
    calls = Calls()
    with calling_by(calls):
        yield calls


@contextmanager
def calling_by(how: Callable[..., Any]) -> Iterator[None]:
    """Has functions with a drop-in that are called by name called by something else.

    Args:
        how: called as an `Ours` is. It is a part of the key of JAX's caches, by its identity.
    """
    with _dispatching(), _context(how):
        yield


def original_of(function: Any) -> Any:
    """The function that something in a namespace stands for; anything else is returned as it is.

    Args:
        function: what a model holds, maybe taken from a namespace inside of `functions`.
    """
    known = _originals.get(id(function))
    return function if known is None else known


_lock = threading.Lock()
_dispatchers: dict[int, Callable[..., Any]] = {}
_originals: dict[int, Callable[..., Any]] = {}
_bound: list[tuple[Any, str, Callable[..., Any]]] = []
_users = 0


@contextmanager
def _dispatching() -> Iterator[None]:
    """Has every namespace hold dispatchers, until the last user is done with them."""
    global _users
    from flax_customgrad import catalogue  # loads the entries of every family, so only when used

    replacements = catalogue.drop_in_functions()
    with _lock:
        if not _users:
            _bind(replacements)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _restore()


def _bind(replacements: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    by_id = {id(function): (function, ours) for function, ours in replacements.items()}
    for path in NAMESPACES:
        module = sys.modules.get(path)
        for name, value in list(vars(module).items()) if module else []:
            if id(original_of(value)) in by_id:
                function, ours = by_id[id(original_of(value))]
                _bound.append((module, name, function))
                setattr(module, name, _dispatcher(function, ours))


def _restore() -> None:
    while _bound:
        module, name, function = _bound.pop()
        # What somebody else has put there since is theirs.
        if original_of(getattr(module, name, None)) is function:
            setattr(module, name, function)


def _dispatcher(function: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a function in a namespace: the same object each time."""
    if id(function) in _dispatchers:
        return _dispatchers[id(function)]

    @functools.wraps(function, updated=())
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        how = _context.value
        if how is None:
            return function(*args, **kwargs)
        frame = sys._getframe(1)
        is_own = frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE
        return how(function, ours, "" if is_own else frame.f_code.co_qualname, *args, **kwargs)

    _dispatchers[id(function)] = dispatch
    _originals[id(dispatch)] = function
    return dispatch
