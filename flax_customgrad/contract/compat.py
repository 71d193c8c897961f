"""The one place for what flax and JAX do not promise: private names, and the texts of their errors.

Each is wrapped in a function here, and `tests/contract/test_compat.py` checks that it exists in the
installed versions and that the library reaches it, so that a rename upstream fails a test and never
turns a gradient off without a word.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import flax
import jax
import jax.core
import jax.extend
from flax import nnx

_F = TypeVar("_F", bound=Callable[..., Any])

Tracer = jax.core.Tracer
"""A value inside a transformation of JAX."""


def is_traced(value: Any) -> bool:
    """Whether a value is known only when a compiled function runs."""
    return isinstance(value, Tracer)


def varying_axes(array: Any) -> frozenset[Any]:
    """The axes of a `shard_map` over which an array varies, or its type, `jax.typeof(array)`."""
    aval = array if hasattr(array, "manual_axis_type") else jax.typeof(array)
    return aval.manual_axis_type.varying


def is_reference(aval: Any) -> bool:
    """Whether a type, as `jax.typeof` gives it, is that of a `jax.Ref`."""
    return hasattr(aval, "inner_aval")


def trace_state() -> Any:
    """What tells one trace from another, comparable with `==`."""
    return jax.extend.core.get_opaque_trace_state(convention="nnx")


_TOP = trace_state()


def is_outside_of_traces() -> bool:
    """Whether the caller runs eagerly, inside no transformation of JAX."""
    return trace_state() == _TOP


def set_class(layer: nnx.Module, cls: type[nnx.Module]) -> None:
    """Changes what a layer is, in place: its class, and nothing that it holds.

    Args:
        layer: a layer of nnx, or a drop-in.
        cls: a class that holds the same attributes.
    """
    # Not `layer.__class__ = cls`: nnx would note `__class__` down as an attribute of the layer.
    object.__setattr__(layer, "__class__", cls)


def check_einsum_equation(layer: nnx.Einsum, equation: str) -> None:
    """Refuses an equation without an arrow or without two operands, in the words of nnx.

    Args:
        layer: a layer of nnx, or a drop-in.
        equation: the equation, without spaces.

    Raises:
        ValueError: there is no "->", or not exactly one comma.
    """
    layer._einsum_str_check(equation)


def overrides_hook(of: type[nnx.Module]) -> Callable[[_F], _F]:
    """Marks a method that overrides a private one of a layer of nnx, which the layer calls.

    Without that method upstream, ours would never be called, and the layer would compute as nnx
    does with the gradient of JAX. So its absence fails when the class is made.

    Args:
        of: the layer of nnx; the method has the name of its hook.

    Raises:
        AttributeError: the layer has no such method.
    """

    def check(method: _F) -> _F:
        name = method.__name__
        if not callable(getattr(of, name, None)):
            raise AttributeError(
                f"flax_customgrad overrides `nnx.{of.__name__}.{name}`, which flax "
                f"{flax.__version__} does not have: the gradient of {of.__name__} would be lost"
            )
        return method

    return check


def is_forward_mode_error(error: BaseException) -> bool:
    """Whether JAX refuses forward mode through a function with a custom VJP."""
    return "forward-mode" in str(error)


def refuses_forward_mode(jaxpr: Any) -> bool:
    """Whether a trace holds the tangent of a custom VJP, which JAX refuses when it compiles it."""
    return "custom_lin" in str(jaxpr)


def is_unbatched_write_error(error: BaseException) -> bool:
    """Whether JAX refuses the write of a batch into a `jax.Ref` that has no batch axis."""
    return "on an unbatched array reference" in str(error)


def is_sharding_type_error(error: BaseException) -> bool:
    """Whether JAX does not know how the result of an operation is sharded."""
    return type(error).__name__ == "ShardingTypeError"
