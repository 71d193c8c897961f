"""`by_platform`: one of several computations, by the platform that a program is lowered for.

`jax.lax.platform_dependent` does the same, and traces them all and two choices around them: a fifth
of the time that a U-Net takes to trace. Here the one of this machine's own platform is traced. The
others are where a program is lowered for another platform, as by `jax.export`, and where a
transformation takes the choice apart: then it is that of JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from flax_customgrad.contract.compat import is_traced

Computation = Callable[..., Any]


def by_platform(*arrays: jax.Array, default: Computation, **per_platform: Computation) -> Any:
    """Calls one of several functions that compute the same.

    Args:
        *arrays: their arguments.
        default: the function for the platforms that are not named.
        **per_platform: functions by the name of a platform, such as `cpu`.

    Returns:
        What the function returns: an array or a tree of them.

    Raises:
        TypeError: the function closes over an array of a trace.
    """
    own = per_platform.get(jax.default_backend(), default)
    jaxpr, shapes = jax.make_jaxpr(own, return_shape=True)(*arrays)
    if any(map(is_traced, jaxpr.consts)):
        # A computation that is traced later would find that trace at its end.
        raise TypeError("a computation closes over a traced array: make it an argument")
    computations = (default, tuple(per_platform.items()))
    flat = _by_platform_p.bind(*arrays, computations=computations, own=own, jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True
_by_platform_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)


def _as_platform_dependent(computations: Any) -> Computation:
    """The choice as JAX makes it, of flat outputs."""
    default, per_platform = computations
    return lambda *arrays: jax.tree.leaves(
        lax.platform_dependent(*arrays, default=default, **dict(per_platform))
    )


@_by_platform_p.def_impl
def _evaluate(*arrays: jax.Array, computations: Any, **_: Any) -> list[jax.Array]:
    return jax.jit(_as_platform_dependent(computations))(*arrays)


def _lower(
    ctx: Any, *values: Any, computations: Any, own: Computation, jaxpr: ClosedJaxpr
) -> Sequence[Any]:
    default, per_platform = computations
    platforms = ctx.platforms or ctx.module_context.platforms
    if all(dict(per_platform).get(platform, default) is own for platform in platforms):
        return mlir.lower_fun(jaxpr_as_fun(jaxpr))(ctx, *values)
    return mlir.lower_fun(_as_platform_dependent(computations))(ctx, *values)


def _jvp(primals: Any, tangents: Any, *, computations: Any, **_: Any) -> Any:
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(_as_platform_dependent(computations), tuple(primals), tangents)


def _batch(arrays: Any, axes: Any, *, computations: Any, **_: Any) -> Any:
    outputs = jax.vmap(_as_platform_dependent(computations), axes)(*arrays)
    return outputs, [0] * len(outputs)


def _transpose(cotangents: Any, *arrays: Any, computations: Any, **_: Any) -> Any:
    linear = [i for i, a in enumerate(arrays) if ad.is_undefined_primal(a)]
    choice = _as_platform_dependent(computations)

    def of_linear(*xs: jax.Array) -> Any:
        return choice(*(xs[linear.index(i)] if i in linear else a for i, a in enumerate(arrays)))

    gradients = jax.linear_transpose(of_linear, *(arrays[i].aval for i in linear))(
        [ad.instantiate_zeros(c) for c in cotangents]
    )
    return [gradients[linear.index(i)] if i in linear else None for i in range(len(arrays))]


mlir.register_lowering(_by_platform_p, _lower)
ad.primitive_jvps[_by_platform_p] = _jvp
ad.primitive_transposes[_by_platform_p] = _transpose
batching.primitive_batchers[_by_platform_p] = _batch
