"""The binding: how a primal, a forward and a backward become something that JAX differentiates.

This is the one file that talks to JAX's machinery of differentiation. An operation becomes a
primitive of `jax.experimental.hijax` with every rule that JAX asks for, made of three functions:

    evaluation      the primal
    reverse mode    the forward and the backward
    forward mode    the forward, and `_Tangent`, a primitive that is linear in the tangents and
                    whose transpose is the backward: `jax.checkpoint`, which differentiates
                    forwards and transposes, meets the backward as well
    vmap            the three under `jax.vmap`, or the operation with one more leading axis

`jax.custom_vjp`, which has reverse mode alone, takes what a primitive cannot: a JAX without such
primitives, arguments that are `jax.Ref`s, and a primal that closes over values of a trace or
branches in Python on a value.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.experimental import hijax

from flax_customgrad.contract import compat
from flax_customgrad.contract.arguments import Static
from flax_customgrad.contract.ordering import transposing

Rule = Callable[..., Any]

_OF_JAX: Any = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive", object)

HAS_PRIMITIVES = _OF_JAX is not object
"""Whether this JAX has primitives with rules of their own, and with them forward mode."""

_Primitive: Any = compat.with_fast_calls(_OF_JAX) if HAS_PRIMITIVES else object

_KEPT_PROGRAMS = 256


class Rules(NamedTuple):
    """What an operation computes, over a static value and a flat list of arrays.

    Attributes:
        name: for messages.
        primal: called as `primal(static, *arrays)`; returns a tree of arrays.
        forward: called like `primal`; returns what it returns, and residuals, a tree of arrays.
        backward: called as `backward(residuals, g, differentiated)` with the cotangent of what
            `primal` returns, and for each array whether it is differentiated, or None where JAX
            does not say. Returns one cotangent for each array; None for zero.
        is_surrogate: `backward` differs from the derivative of `primal` on purpose: forward mode
            is its transpose.
        is_pure: what the rules return depends on their arguments alone: calls with arguments of
            the same types share one trace of each, and outside of any trace one compiled `primal`.
        has_rate: called with the static value; whether it holds a number that may change from call
            to call. Such a call is not compiled outside of a trace.
        shared: called with the static value; of an operation that takes any number of leading
            axes, the number of leading arrays that do not have them.
    """

    name: str
    primal: Rule
    forward: Rule
    backward: Rule
    is_surrogate: bool = False
    is_pure: bool = False
    has_rate: Callable[[Any], bool] = lambda static: False
    shared: Callable[[Any], int] | None = None


def bind(rules: Rules) -> Rule:
    """Makes a function of arrays that JAX differentiates by rules.

    Args:
        rules: what the operation computes.

    Returns:
        A function called like `rules.primal`.
    """
    by_custom_vjp = _by_custom_vjp(rules)
    if not HAS_PRIMITIVES:
        return by_custom_vjp

    eager = _compiled(rules) if rules.is_pure else rules.primal

    def bound(static: Any, *arrays: Any) -> Any:
        if not any(map(compat.is_traced, arrays)):
            return eager(static, *arrays)
        types = tuple(map(jax.typeof, arrays))
        if any(map(compat.is_reference, types)):
            return by_custom_vjp(static, *arrays)
        primitive = of_types(static, types, compat.trace_context())
        return by_custom_vjp(static, *arrays) if primitive is None else primitive(*arrays)

    def of_types(static: Any, types: tuple[Any, ...], context: Any) -> "_Operation | None":
        """The primitive for arrays of some types; what else a trace depends on is `context`."""
        of_arrays = rules._replace(
            primal=functools.partial(rules.primal, static),
            forward=functools.partial(rules.forward, static),
        )
        if rules.is_pure:
            of_arrays = of_arrays._replace(
                forward=_forward_traced_once(of_arrays, types),
                backward=_backward_traced_once(of_arrays),
            )
        if rules.shared is None:
            return _operation(of_arrays, types)
        again = functools.partial(bound, static)
        return _operation(of_arrays, types, _with_leading_axis(again, rules.shared(static)))

    if rules.is_pure:
        of_types = functools.lru_cache(1024)(of_types)
    return bound


def _compiled(rules: Rules) -> Rule:
    """The primal as one compiled program for each static value, of which the latest are kept.

    A jit with a static argument would keep thousands of them, a megabyte each. A slope or a rate
    may change from step to step, and would be compiled anew in each.
    """

    @functools.lru_cache(_KEPT_PROGRAMS)
    def of_static(static: Any) -> Rule:
        primal = functools.partial(rules.primal, static)
        return primal if rules.has_rate(static) else jax.jit(_named(rules.name, primal))

    return lambda static, *arrays: of_static(static)(*arrays)


def _named(name: str, function: Rule) -> Rule:
    """A function under the name that programs and profiles show."""

    def named(*args: Any) -> Any:
        return function(*args)

    named.__name__ = name
    return named


def _forward_traced_once(rules: Rules, types: tuple[Any, ...]) -> Rule:
    """A forward that the layers of a model trace once.

    Its operations become those of the caller; of a call XLA would keep more. What it keeps of its
    arguments, or returns as well, stays the same array. Outside of a trace it runs as it is: there
    XLA drops nothing of what it keeps.
    """
    compute = jax.jit(_named(f"{rules.name}_fwd", rules.forward), inline=True)

    @functools.cache
    def traced() -> tuple[list[int], Any]:
        """Where each leaf is first, among the arguments and then the leaves; and their tree."""
        trace = compute.trace(*types)
        outputs = list(map(id, trace.jaxpr.jaxpr.outvars))
        variables = [*map(id, trace.jaxpr.jaxpr.invars), *outputs]
        return list(map(variables.index, outputs)), jax.tree.structure(trace.out_info)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        if not any(map(compat.is_traced, arrays)):
            return rules.forward(*arrays)
        places, structure = traced()
        # JAX hands over a number as it was, and an array of NumPy in a dtype of its own.
        arrays = tuple(
            a if getattr(a, "dtype", None) == aval.dtype else jnp.asarray(a, aval.dtype)
            for a, aval in zip(arrays, types, strict=True)
        )
        values = [*arrays, *jax.tree.leaves(compute(*arrays))]
        return structure.unflatten([values[place] for place in places])

    return forward


def _backward_traced_once(rules: Rules) -> Rule:
    """A backward that the layers of a model trace once, as `_forward_traced_once` does."""
    compute = jax.jit(_named(f"{rules.name}_bwd", rules.backward), static_argnums=2, inline=True)

    def backward(residuals: Any, g: Any, differentiated: Any) -> Any:
        is_inside = any(map(compat.is_traced, jax.tree.leaves((residuals, g))))
        rule = compute if is_inside else rules.backward
        return rule(residuals, g, differentiated)

    return backward


def _by_custom_vjp(rules: Rules) -> Rule:
    def backward(residuals: Any, g: Any) -> tuple[Any, ...]:
        return (None, *rules.backward(residuals, g, None))

    bound = jax.custom_vjp(_with_known_signature(rules.primal))
    bound.defvjp(_with_known_signature(rules.forward), backward)
    return bound


def _with_known_signature(method: Rule) -> Rule:
    """A method as a function whose signature JAX need not work out anew at each call."""

    def function(*args: Any) -> Any:
        return method(*args)

    function.__name__ = method.__name__
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return function


def _operation(
    rules: Rules, types: tuple[Any, ...], with_leading_axis: Rule | None = None
) -> "_Operation | None":
    """The primitive for arrays of some types; None where JAX cannot trace the primal on its own.

    It may close over values of a trace, or branch in Python on a value, which is known where
    `jax.grad` runs eagerly.
    """
    try:
        traced, shapes = jax.make_jaxpr(rules.primal, return_shape=True)(*types)
    except Exception as error:
        if compat.is_concrete_value_error(error):
            return None
        raise
    if any(map(compat.is_traced, traced.consts)):
        return None
    structure = jax.tree.structure(shapes)
    flat = jax.extend.core.jaxpr_as_fun(traced)
    if rules.is_pure:  # many layers of a model call one compiled function
        flat = jax.jit(_named(rules.name, flat))
    rules = rules._replace(primal=lambda *arrays: structure.unflatten(flat(*arrays)))
    return _Operation(rules, types, structure.unflatten(traced.out_avals), with_leading_axis)


class _Operation(_Primitive):
    """An operation on arrays of known types; its rules take no static value."""

    rules: Rules
    with_leading_axis: Rule | None

    def __init__(
        self, rules: Rules, types: tuple[Any, ...], out_type: Any, with_leading_axis: Rule | None
    ):
        self.in_avals = types
        self.out_aval = out_type
        self.params = {"rules": rules, "with_leading_axis": with_leading_axis}
        super().__init__()

    def __repr__(self) -> str:
        return self.rules.name

    def pp_params(self) -> dict[str, Any]:
        """What a printed program shows of it."""
        return {"name": self.rules.name}

    def expand(self, *arrays: Any) -> Any:
        return self.rules.primal(*arrays)

    def vjp_fwd(self, nonzeros: Any, /, *arrays: Any) -> tuple[Any, Any]:
        out, kept = self.rules.forward(*arrays)
        return out, (kept, Static(tuple(nonzeros)))

    def vjp_bwd_retval(self, residuals: Any, cotangent: Any, /) -> tuple[Any, ...]:
        kept, nonzeros = residuals
        return self._cotangents(kept, _instantiated(cotangent), nonzeros.value)

    def jvp(self, primals: Any, tangents: Any) -> tuple[Any, Any]:
        out, residuals = self.lin(None, *primals)
        return out, self.linearized(residuals, *tangents)

    def lin(self, nonzeros: Any, *primals: Any) -> tuple[Any, Any]:
        out, kept = self.rules.forward(*primals)
        return out, (kept, primals)

    def linearized(self, residuals: Any, *tangents: Any) -> Any:
        kept, primals = residuals
        nonzeros = tuple(not _is_zero(tangent) for tangent in tangents)
        along, point = (
            (self._transpose, kept) if self.rules.is_surrogate else (self._derivative, primals)
        )
        args = kept, point, tuple(map(hijax.instantiate_zeros, tangents))
        tangent = _Tangent(
            along,
            lambda kept, g: self._cotangents(kept, g, nonzeros),
            jax.tree.map(jax.typeof, args),
            jax.tree.map(lambda aval: aval.to_tangent_aval(), self.out_aval),
        )
        return tangent(*args)

    def batch(self, axis_data: Any, arrays: Any, dims: Any) -> tuple[Any, Any]:
        if self.with_leading_axis is not None and axis_data.name is compat.NO_AXIS_NAME:
            out = self.with_leading_axis(arrays, dims)
            if out is not None:
                # A count, say, is the same for all examples.
                has_axis = jax.tree.map(lambda a, aval: a.ndim > aval.ndim, out, self.out_aval)
                return out, jax.tree.map(lambda has: 0 if has else None, has_axis)
        vmap, dims = _vmap_of(axis_data), tuple(dims)
        rules = self.rules._replace(
            primal=vmap(self.rules.primal, dims, 0),
            forward=_batched_forward(vmap, self.rules.forward, dims),
            backward=_batched_backward(vmap, self.rules.backward, dims),
        )
        types = tuple(map(jax.typeof, arrays))
        operation = _Operation(rules, types, _stacked(vmap, self.out_aval), None)
        return operation(*arrays), jax.tree.map(lambda _: 0, self.out_aval)

    def _cotangents(self, kept: Any, g: Any, nonzeros: Any) -> tuple[Any, ...]:
        """The cotangents of all arrays, with zeros where the backward returned None."""
        cts = self.rules.backward(kept, g, nonzeros)
        return tuple(
            hijax.instantiate_zeros(hijax.Zero(aval.to_ct_aval())) if ct is None else ct
            for aval, ct in zip(self.in_avals, cts, strict=True)
        )

    def _derivative(self, primals: Any, tangents: Any) -> Any:
        return jax.jvp(self.rules.primal, tuple(primals), tuple(tangents))[1]

    def _transpose(self, kept: Any, tangents: Any) -> Any:
        """What the backward is the transpose of."""
        g, structure = jax.tree.flatten(
            jax.tree.map(
                lambda aval: hijax.instantiate_zeros(hijax.Zero(aval.to_ct_aval())), self.out_aval
            )
        )
        of_g, of_arrays = (_inexact(avals) for avals in (g, self.in_avals))

        def backward(*floats: Any) -> list[Any]:
            cts = self._cotangents(kept, structure.unflatten(_replaced(g, of_g, floats)), None)
            return [cts[i] for i in of_arrays]

        try:
            with transposing():
                transposed = jax.linear_transpose(backward, *(g[i] for i in of_g))
            found = transposed([tangents[i] for i in of_arrays])
        except Exception as error:
            raise TypeError(
                f"`{self.rules.name}` has no forward mode: forward mode through a surrogate is the "
                "transpose of its backward, which has to be linear in the cotangent, made of "
                "operations that JAX can transpose"
            ) from error
        return structure.unflatten(_replaced(g, of_g, found))


_NEEDS_COTANGENTS = jax.__version_info__ < (0, 12)
"""Whether what was kept needs a cotangent though a tangent does not depend on it: before 0.12 JAX
cannot transpose a scan, such as that of a fwd, if what it stacked has none."""


class _Tangent(_Primitive):
    """The derivative of an operation along tangents, in which it is linear.

    Its arguments are what the forward kept, the point that the derivative is taken at, and the
    tangents. `along` computes it from point and tangents; its transpose is the backward.
    """

    along: Rule
    backward: Rule

    def __init__(self, along: Rule, backward: Rule, types: Any, out_type: Any):
        self.in_avals = types
        self.out_aval = out_type
        self.params = {"along": along, "backward": backward}
        super().__init__()

    def expand(self, kept: Any, point: Any, tangents: Any) -> Any:
        return self.along(point, tangents)

    def transpose(self, cotangent: Any, kept: Any, point: Any, tangents: Any) -> None:
        cts = self.backward(kept, _instantiated(cotangent))
        for tangent, ct in zip(tangents, cts, strict=True):
            if hasattr(tangent, "accum"):
                tangent.accum(ct)

    def jvp(self, args: Any, tangents: Any) -> tuple[Any, Any]:
        return jax.jvp(self.along, tuple(args[1:]), tuple(map(_instantiated, tangents[1:])))

    def lin(self, nonzeros: Any, kept: Any, *args: Any) -> tuple[Any, Any]:
        return jax.linearize(self.along, *args)

    def linearized(self, residuals: Any, kept: Any, *tangents: Any) -> Any:
        return residuals(*map(_instantiated, tangents))

    def vjp_fwd(self, nonzeros: Any, /, kept: Any, *args: Any) -> tuple[Any, Any]:
        return jax.vjp(self.along, *args)

    def vjp_bwd_retval(self, residuals: Any, cotangent: Any, /) -> tuple[Any, ...]:
        nothing = jax.tree.map(lambda aval: hijax.Zero(aval.to_ct_aval()), self.in_avals[0])
        nothing = _instantiated(nothing) if _NEEDS_COTANGENTS else nothing
        return nothing, *residuals(_instantiated(cotangent))

    def batch(self, axis_data: Any, args: Any, dims: Any) -> tuple[Any, Any]:
        vmap = _vmap_of(axis_data)
        kept, point, tangents = dims

        def backward(residuals: Any, g: Any) -> tuple[Any, ...]:
            return _summed(vmap(self.backward, (kept, 0), 0)(residuals, g), tangents)

        tangent = _Tangent(
            vmap(self.along, (point, tangents), 0),
            backward,
            jax.tree.map(jax.typeof, args),
            _stacked(vmap, self.out_aval),
        )
        return tangent(*args), jax.tree.map(lambda _: 0, self.out_aval)


def _with_leading_axis(bound: Rule, shared: int) -> Rule:
    """What an operation makes of a batch whose mapped axis becomes one more leading axis.

    Returns:
        A function of arrays and their mapped axes, which returns None where one of the first
        `shared` arrays is mapped or one of the others is not, and on a mesh with Explicit axes,
        where a static argument may say how each axis of the output is sharded.
    """

    def with_leading_axis(arrays: Any, dims: Any) -> Any:
        is_shared = [dim is None for dim in dims]
        if not all(is_shared[:shared]) or any(is_shared[shared:]) or compat.has_explicit_axes():
            return None
        moved = (jnp.moveaxis(a, d, 0) for a, d in zip(arrays[shared:], dims[shared:], strict=True))
        return bound(*arrays[:shared], *moved)

    return with_leading_axis


def _vmap_of(axis_data: Any) -> Rule:
    """`jax.vmap` along the axis that JAX maps."""

    def vmap(rule: Rule, in_axes: Any, out_axes: Any) -> Rule:
        return jax.vmap(
            rule,
            in_axes,
            out_axes,
            axis_size=axis_data.size,
            axis_name=axis_data.name,
            spmd_axis_name=axis_data.spmd_name or axis_data.explicit_mesh_axis,
        )

    return vmap


def _batched_forward(vmap: Rule, forward: Rule, dims: Any) -> Rule:
    """The forward of a batch; a residual that all examples share is kept once."""

    def batched(*arrays: Any) -> tuple[Any, Any]:
        (out, kept), (_, axes) = vmap(forward, dims, (0, compat.INFERRED_AXIS))(*arrays)
        return out, (kept, Static(tuple(jax.tree.structure(kept).flatten_up_to(axes))))

    return batched


def _batched_backward(vmap: Rule, backward: Rule, dims: Any) -> Rule:
    def batched(residuals: Any, g: Any, nonzeros: Any) -> tuple[Any, ...]:
        kept, axes = residuals
        axes = jax.tree.structure(kept).unflatten(axes.value)
        cts = vmap(lambda kept, g: backward(kept, g, nonzeros), (axes, 0), 0)(kept, g)
        return _summed(cts, dims)

    return batched


def _summed(cts: Any, dims: Any) -> tuple[Any, ...]:
    """The cotangents of a batch, stacked along the first axis, as those of its arrays.

    What all examples share has the sum of their gradients.
    """
    return tuple(
        ct if ct is None else ct.sum(0) if dim is None else jnp.moveaxis(ct, 0, dim)
        for ct, dim in zip(cts, dims, strict=True)
    )


def _stacked(vmap: Rule, types: Any) -> Any:
    """The types of a batch, with the mapped axis in front."""
    traced = jax.make_jaxpr(vmap(lambda tree: tree, None, 0))(types)
    return jax.tree.structure(types).unflatten(traced.out_avals)


def _inexact(avals: Any) -> list[int]:
    """Which of several arrays or types have a derivative."""
    return [i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]


def _replaced(values: list[Any], places: list[int], by: Any) -> list[Any]:
    """A list with other values in some places."""
    other = dict(zip(places, by, strict=True))
    return [other.get(i, value) for i, value in enumerate(values)]


def _instantiated(tree: Any) -> Any:
    """Cotangents or tangents with arrays in place of symbolic zeros."""
    return jax.tree.map(hijax.instantiate_zeros, tree, is_leaf=_is_zero)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, hijax.Zero)
