"""What an error means that the function, the fwd or the bwd of an operation has raised."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract import compat
from flax_customgrad.contract.cotangents import CotangentError, describe


def of_function(
    name: str, names: Sequence[str], args: Sequence[Any], error: Exception
) -> TypeError | None:
    """Explains an error that a function or its fwd raised, where the cause is a known one.

    An argument that should be static, such as an axis, may be traced: it is an argument of an outer
    `jax.jit`, or an array.

    Args:
        name: the operation, for the message.
        names: the names of its arguments.
        args: its arguments.
        error: what it raised.

    Returns:
        The error to raise instead, or None to let it pass.
    """
    traced = [
        f"`{argument}`, {describe(arg)}"
        for argument, arg in zip(names, args, strict=True)
        if compat.is_traced(arg) and arg.ndim == 0 and not jnp.issubdtype(arg.dtype, jnp.inexact)
    ]
    if not traced or not compat.is_concrete_value_error(error):
        return None
    return TypeError(
        f"`{name}` needs a value that is known while JAX traces it, and of its arguments "
        f"{', '.join(traced)} is traced. Make it static: where it is an argument of jax.jit or "
        "nnx.jit, by static_argnums or static_argnames there; where it is an array, by int(...) or "
        "bool(...) before the call"
    )


def of_fwd(name: str, names: Sequence[str], args: Sequence[Any]) -> str:
    """What to add to an error that a fwd raised.

    Args:
        name: the operation.
        names: the names of its arguments.
        args: its arguments.
    """
    given = ", ".join(f"{n} = {describe(arg)}" for n, arg in zip(names, args, strict=True))
    return f"in the fwd of `{name}`, where {given}; defvjp takes first fwd, then bwd"


def of_backward(name: str, g: Any, error: Exception) -> CotangentError | None:
    """Explains an error that a backward raised: by another one, or by a note on it.

    `nnx.State((x_grad,))`, the form in circulation for the cotangent of an array, fails inside
    flax with "unhashable type" before anything is returned. On a mesh with Explicit axes `x.T @ g`
    fails because JAX will not guess the sharding of the product.

    Args:
        name: the operation, for the message.
        g: the cotangent that the backward was given.
        error: what it raised.

    Returns:
        The error to raise instead, or None to let it pass.
    """
    content = _mapping_of_a_state(error)
    if isinstance(content, tuple | list):
        built = ", ".join(map(describe, content))
        return CotangentError(
            f"the backward of `{name}` built nnx.State(({built},)): a State maps names to "
            "cotangents, and an array has no names. The cotangent of an array is the array itself: "
            "write `x_grad` for an array, and nnx.State({'kernel': kernel_grad, ...}) for a Module"
        )
    if compat.is_sharding_type_error(error):
        error.add_note(
            f"in the backward of `{name}`: a product over a sharded axis has to say how its result "
            "is sharded. For the gradient of `kernel` that is as the kernel is: "
            "jnp.einsum(..., out_sharding=jax.typeof(kernel).sharding)"
        )
    elif isinstance(error, ValueError) and "to unpack" in str(error):
        error.add_note(
            f"the backward of `{name}` is given its residuals as fwd returned them, and g, the "
            f"cotangent of the output itself: {describe(g)}. (nnx.custom_vjp hands over a pair, "
            "the updates of the inputs and g.)"
        )
    else:
        error.add_note(f"in the backward of `{name}`, where g is {describe(g)}")
    return None


def _mapping_of_a_state(error: Exception) -> Any:
    """What an `nnx.State` was made of, where its constructor raised the error."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code is not nnx.State.__init__.__code__:
        return None
    return traceback.tb_frame.f_locals.get("mapping")
