"""The check of forward mode: the tangent of a value, and derivatives of that.

An exact operation has the tangent of its plain function. That of a surrogate is the transpose of
its backward, where that is linear in the cotangent.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from flax_customgrad.testing.compare import Comparison, Fn, Skip
from flax_customgrad.testing.problem import Gradient, Problem

REQUIRED = True
"""Whether an exact operation without forward mode fails its check, or is skipped."""


def forward_mode(p: Problem) -> Iterator[Comparison]:
    """The tangent of the value, alone and under jax.vmap, and its gradient."""
    first, second = (p.directions(seed) for seed in (5, 6))

    def tangent(fn: Fn, direction: Gradient) -> Gradient:
        return tuple(jax.jvp(p.outputs(fn), p.values, direction)[1])

    def expected(direction: Gradient) -> Gradient:
        if not p.is_surrogate:
            return tangent(p.reference, direction)
        out, pull = jax.vjp(p.outputs(p.reference), *p.values)
        return tuple(*jax.linear_transpose(pull, out)(direction))

    def along_both(fn: Fn) -> Gradient:
        both = tuple(map(jnp.stack, zip(first, second, strict=True)))
        return jax.vmap(lambda *direction: tangent(fn, direction))(*both)

    def expected_of_both() -> Gradient:
        return tuple(map(jnp.stack, zip(expected(first), expected(second), strict=True)))

    def gradient(fn: Fn) -> Gradient:
        def along(*values: jax.Array) -> jax.Array:
            tangents = jax.jvp(p.outputs(fn), values, first)[1]
            pairs = zip(tangents, p.cotangent, strict=True)
            return sum((jnp.vdot(t, g) for t, g in pairs), jnp.zeros(()))

        return jax.grad(along, tuple(range(len(p.values))))(*p.values)

    def where_supported(run: Callable[[Fn], Gradient]) -> Callable[[Fn], Gradient]:
        def run_or_skip(fn: Fn) -> Gradient:
            try:
                return run(fn)
            except Exception:
                if _refuses(p, fn):
                    raise Skip("forward mode is not supported") from None
                raise

        return run_or_skip

    def compare(case: str, run: Callable[[Fn], Gradient], expected, of=None) -> Comparison:
        return Comparison(case, where_supported(run), expected, of=of, is_forward=True)

    yield compare("jvp", lambda fn: tangent(fn, first), lambda: expected(first), of="output")
    yield compare("vmap of jvp", along_both, expected_of_both, of="output")
    if not p.is_surrogate:
        yield compare("grad of jvp", gradient, lambda: gradient(p.reference))


def _refuses(p: Problem, fn: Fn) -> bool:
    """Whether a function has no forward mode and need not have it.

    A surrogate need not, nor need `jax.custom_vjp`, which has none.
    """
    try:
        jax.jvp(p.outputs(fn), p.values, p.values)
    except Exception as error:
        if not isinstance(error, TypeError) or "forward" not in str(error):
            return False
    else:
        return False
    if not REQUIRED or p.is_surrogate:
        return True
    return "custom_vjp_call" in str(jax.make_jaxpr(p.apply(fn))(*p.arrays))
