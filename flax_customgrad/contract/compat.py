"""The one place for what flax and JAX do not promise: private names, and the texts of their errors.

Each is wrapped in a function here, and `tests/contract/test_compat.py` checks that it exists in the
installed versions and that the library reaches it, so that a rename upstream fails a test and never
turns a gradient off without a word.
"""

import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import flax
import jax
import jax.core
import jax.extend
from flax import nnx
from jax._src import config, core, source_info_util
from jax._src import hijax as private_hijax
from jax._src.interpreters import ad, batching, mlir, partial_eval, remat

_F = TypeVar("_F", bound=Callable[..., Any])

Tracer = jax.core.Tracer
"""A value inside a transformation of JAX."""


def is_traced(value: Any) -> bool:
    """Whether a value is known only when a compiled function runs."""
    return isinstance(value, Tracer)


POSING_AS_VARIABLES: tuple[type, ...] = (Tracer, nnx.variablelib.HijaxVariable)
"""Classes with instances that are an `nnx.Variable` for `isinstance`, though the class is none."""


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


def trace_context() -> Any:
    """What a trace depends on beside its arguments (mesh, axes, flags of JAX); hashable."""
    return config.trace_context()


INFERRED_AXIS: Any = batching.infer
"""An `out_axes` of `jax.vmap`: its own mapped axis, or None, comes beside an output."""


def has_explicit_axes() -> bool:
    """Whether the current mesh has Explicit axes, with which sharding is a part of a type."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def with_fast_calls(base: type) -> type:
    """The base of primitives of hijax, such that `jax.jit` calls a program with them fast.

    Before 0.12 a program that holds one is called in Python: 0.2 ms, and 0.02 more for each of its
    arguments, in every call. So there ours are a primitive of a lower level, which has the rules of
    hijax, and what they expand to where a program is compiled.

    Args:
        base: the class of hijax.
    """
    if jax.__version_info__ >= (0, 12):
        return base
    of_hijax = private_hijax.call_hi_primitive_p
    # It has the name of that of hijax: by this name JAX knows that its parameters have no hash.
    primitive = jax.extend.core.Primitive(of_hijax.name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *_, _prim: _prim.out_avals_flat)
    primitive.def_impl(of_hijax.to_lojax)
    mlir.register_lowering(primitive, mlir.lower_fun(of_hijax.to_lojax))
    for rules in (
        ad.primitive_jvps,
        ad.primitive_linearizations,
        ad.fancy_transposes,
        batching.fancy_primitive_batchers,
        partial_eval.dce_rules,
        remat.rules,
    ):
        rules[primitive] = rules[of_hijax]

    class Primitive(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> Any:
            flat = primitive.bind(*self.in_tree.flatten_up_to(args), _prim=self)
            return self.out_tree.unflatten(flat)

    return Primitive


NO_AXIS_NAME: Any = core.no_axis_name
"""The name that `jax.vmap` gives to an axis without one."""


def is_outside_of_traces() -> bool:
    """Whether the caller runs eagerly, inside no transformation of JAX."""
    return trace_state() == _TOP


def is_from_outside_of_trace(model: Any) -> bool:
    """Whether the caller is inside a transformation, and the model was not made there.

    It was made at another level of tracing; or a transformation of nnx has made a copy of it for
    the function that it calls, and expects that back as it was.

    Args:
        model: a tree of Modules.
    """
    if is_outside_of_traces():
        return False
    nodes = [n for _, n in nnx.iter_graph(model, graph=True) if isinstance(n, nnx.Pytree)]
    if not all(node._pytree__state.trace_state.is_valid() for node in nodes):
        return True
    frame, known = inspect.currentframe(), set(map(id, nodes))
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("flax.nnx.transforms"):
            arguments = [frame.f_locals.get(name) for name in ("args", "kwargs", "primals")]
            if any(id(node) in known for _, node in nnx.iter_graph(arguments, graph=True)):
                return True
        frame = frame.f_back
    return False


def has_shared_nodes(graphdef: nnx.GraphDef) -> bool:
    """Whether a Module that was split holds something at two paths."""
    return any(isinstance(node, nnx.graph.NodeRef) for node in graphdef.nodes)  # type: ignore


def innermost_derivative() -> Any:
    """The derivative that the caller is inside of, to ask `is_of_derivative` about; or None."""
    trace = core.trace_ctx.trace
    while trace is not None and type(trace).__name__ not in ("JVPTrace", "LinearizeTrace"):
        trace = getattr(trace, "parent_trace", None)
    return None if trace is None else weakref.ref(trace)


def is_of_derivative(value: Any, derivative: Any) -> bool:
    """Whether an array is one that a derivative differentiates."""
    return derivative is not None and is_traced(value) and value._trace is derivative()


def is_of_finished_trace(value: Any) -> bool:
    """Whether an array belongs to a program that has been traced to its end."""
    frame = getattr(value._trace, "frame", None) if is_traced(value) else None
    # JAX empties what a program under way holds weakly.
    return isinstance(getattr(frame, "constid_to_tracer", None), dict)


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


def has_custom_gradient(jaxpr: Any) -> bool:
    """Whether a trace holds a function with a gradient of its own, of JAX or of this library."""
    text = str(jaxpr)
    # The last two are the primitive of `binding`, as jax 0.10 and as jax 0.12 print it.
    return any(name in text for name in ("custom_vjp_call", "call_hi_primitive", "_Operation["))


def refuses_forward_mode(jaxpr: Any) -> bool:
    """Whether a trace holds the tangent of a custom VJP, which JAX refuses when it compiles it."""
    return "custom_lin" in str(jaxpr)


def is_concrete_value_error(error: BaseException) -> bool:
    """Whether a value was needed that JAX knows only when the compiled function runs."""
    kinds = (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.TracerArrayConversionError,
    )
    text = str(error)
    return isinstance(error, kinds) or (
        isinstance(error, TypeError)
        and ("concrete values" in text or ("unhashable" in text and "Tracer" in text))
    )


def is_unbatched_write_error(error: BaseException) -> bool:
    """Whether JAX refuses the write of a batch into a `jax.Ref` that has no batch axis."""
    return "on an unbatched array reference" in str(error)


def is_sharding_type_error(error: BaseException) -> bool:
    """Whether JAX does not know how the result of an operation is sharded."""
    return type(error).__name__ == "ShardingTypeError"


def source_line(equation: Any, packages: tuple[str, ...]) -> str:
    """The file and line that an equation of a jaxpr comes from; "" where that is unknown.

    Args:
        equation: the equation.
        packages: names of packages whose lines are passed over, for those that call them.
    """
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        path = Path(frame.file_name)
        if path.parent.name.startswith("ipykernel"):
            return f"line {frame.start_line} of a cell"
        if not set(packages) & set(path.parts):
            return f"{path.name}:{frame.start_line}"
    return ""
