"""The choice of lowering: what computes a convolution and its gradients, by its shape.

On a CPU each of the three passes goes through the table below, by the first row that fits. Grouped
and transposed convolutions are taken apart, and their parts go through the table again. Of the 78
shapes of `benchmarks.convolutions` none took 1.07 times as long as by XLA with jax 0.12, and with
0.10.2 one took 1.16 times: a single image of 128 x 128. Elsewhere it is XLA's own, with the
gradients that JAX has for it. `by_platform` decides when a program is lowered, so an exported
program chooses where it runs. With Explicit axes of a mesh it is XLA's own everywhere. With Auto
axes on CPUs a lowering that cuts an image or a kernel up may gather it more often than XLA's own
would: `use_lowering("xla")`.

    patch        windows that do not overlap, and 1 x 1    one matrix product
    depthwise    groups of one or two features             shifted copies, blockwise sums
    transposed   a dilated input                           a convolution for each phase
    grouped      other groups                              16 features at a time, block-diagonal
    dense        what is left                              XLA's, its dw in the fast layout
    xla          strides and a dilated input at once       XLA's and JAX's own
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.contract.ordering import is_transposing
from flax_customgrad.layers.conv.geometry import Geometry, mirror_kernel
from flax_customgrad.layers.conv.lowerings.dense import DenseLowering
from flax_customgrad.layers.conv.lowerings.depthwise import DepthwiseLowering
from flax_customgrad.layers.conv.lowerings.grouped import GroupedLowering
from flax_customgrad.layers.conv.lowerings.lowering import Lowering
from flax_customgrad.layers.conv.lowerings.patches import PatchLowering
from flax_customgrad.layers.conv.lowerings.transposed import TransposedLowering
from flax_customgrad.layers.conv.lowerings.xla_convolution import (
    XlaLowering,
    xla_correlate,
    xla_input_gradient,
    xla_kernel_gradient,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.by_platform import by_platform
from flax_customgrad.numerics.sharding import explicit_sharding, varying_like


class _LoweringByShape(Lowering):
    """For each shape what `chosen_lowering` says."""

    def fits(self, geometry: Geometry) -> bool:
        return True

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        return LOWERINGS[chosen_lowering(geometry)].correlate(x, w, geometry)

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        return LOWERINGS[chosen_lowering(geometry)].kernel_gradient(x, g, geometry)


_BY_SHAPE = _LoweringByShape()

LOWERINGS: dict[str, Lowering] = {
    "patch": PatchLowering(),
    "depthwise": DepthwiseLowering(),
    "transposed": TransposedLowering(_BY_SHAPE),
    "grouped": GroupedLowering(_BY_SHAPE),
    "dense": DenseLowering(),
    "xla": XlaLowering(),
}

# A context that JAX itself knows of: what was traced in one is not taken for the other.
_forced = jax.make_user_context(default_value=None)


def use_lowering(name: str) -> AbstractContextManager[None]:
    """Forces one lowering on every convolution whose shape it fits, and XLA's own on all others.

    For a comparison, or to see whether a lowering is to blame. It holds on every platform.

    Args:
        name: "patch", "depthwise", "grouped", "transposed", "dense" or "xla".

    Returns:
        A context manager. It acts on the thread that enters it, and on what is traced in it.

    Raises:
        ValueError: there is no such lowering; the error lists them.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> conv = fcg.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> with fcg.use_lowering("xla"):
        ...     y = conv(jnp.ones((2, 8, 8, 3)))
    """
    if name not in LOWERINGS:
        raise ValueError(f"no lowering {name!r}; there are {', '.join(LOWERINGS)}")
    return _forced(name)


def chosen_lowering(geometry: Geometry) -> str:
    """The name of the lowering for a shape on a CPU, or of the one that is forced.

    Args:
        geometry: any; not empty.
    """
    if _forced.value is not None:
        return _forced.value if LOWERINGS[_forced.value].fits(geometry) else "xla"
    return next(name for name, lowering in LOWERINGS.items() if lowering.fits(geometry))


# The jit makes one call of it, traced once for each shape, outside of any other jit too.
@functools.partial(jax.jit, inline=True, static_argnums=(2, 3, 4, 5))
def correlate(
    x: jax.Array,
    w: jax.Array,
    geometry: Geometry,
    dtype: Any = None,
    precision: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """A convolution.

    Args:
        x: array of shape (batch, *size, in_features), float.
        w: array of shape (*window, in_features // groups, out_features), of the dtype of x.
        geometry: where the windows lie.
        dtype: dtype of the result, that of x by default. A CPU sums in float32 or wider.
        precision: `jax.lax.Precision` of the products off the CPU; a CPU rounds none.
        out_sharding: sharding of the result on a mesh with Explicit axes, or None.

    Returns:
        Array of shape (batch, *out, out_features).
    """

    def by_shape(x: jax.Array, w: jax.Array) -> jax.Array:
        out = dtype or x.dtype
        x, w = _widened(geometry, accumulator(x, out), x, w)
        return _BY_SHAPE.correlate(x, w, geometry).astype(out)

    def by_xla(x: jax.Array, w: jax.Array) -> jax.Array:
        return xla_correlate(
            x,
            w,
            geometry,
            preferred_element_type=dtype,
            precision=precision,
            out_sharding=out_sharding,
        )

    # Where both are the same, a program needs no choice: it is traced and lowered sooner.
    is_wide = x.dtype == (dtype or x.dtype) == accumulator(x)
    if is_wide and _forced.value is None and chosen_lowering(geometry) == "dense":
        return by_xla(x, w)
    return _on_this_platform(geometry, by_shape, by_xla, x, w)


@functools.partial(jax.jit, inline=True, static_argnums=(3, 4))
def correlate_gradients(
    x: jax.Array, w: jax.Array, g: jax.Array, geometry: Geometry, precision: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `correlate` for its input and its kernel.

    Args:
        x: the input, as for `correlate`.
        w: the kernel, as for `correlate`.
        g: cotangent of shape (batch, *out, out_features), float.
        geometry: that of `correlate`.
        precision: as for `correlate`.

    Returns:
        The gradient of x, in its dtype, and of w, in float32 or wider. Off the CPU that has been
        rounded to the dtype of w before, as JAX does it.
    """
    wide = accumulator(x, w, g)

    def by_shape(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = x.dtype
        x, w, g = _widened(geometry, wide, x, w, g)
        dx = _BY_SHAPE.correlate(g, mirror_kernel(w, geometry.groups), geometry.transposed)
        return dx.astype(dtype), _BY_SHAPE.kernel_gradient(x, g, geometry)

    def by_xla(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The input and the kernel of each device: their gradients are summed later.
        g, x, w = g.astype(x.dtype), varying_like(x, g), varying_like(w, g)
        of_output = {"precision": precision, "out_sharding": explicit_sharding(jax.typeof(g))}
        dx = xla_input_gradient(g, w, geometry, x, **of_output)
        return dx, xla_kernel_gradient(x, g, geometry, w, **of_output).astype(wide)

    return _on_this_platform(geometry, by_shape, by_xla, x, w, g)


def _widened(geometry: Geometry, wide: Any, *arrays: jax.Array) -> Sequence[jax.Array]:
    """Arrays in a dtype to sum in; of bfloat16 a product does, which is all that a 1 x 1 one is."""
    is_product = math.prod(geometry.window) == 1 and chosen_lowering(geometry) == "patch"
    if is_product and {a.dtype for a in arrays} == {jnp.dtype(jnp.bfloat16)}:
        return arrays
    return [a.astype(wide) for a in arrays]


def _on_this_platform(
    geometry: Geometry, by_shape: Callable[..., Any], by_xla: Callable[..., Any], *arrays: Any
) -> Any:
    empty = 0 in geometry.out or any(0 in a.shape for a in arrays)
    # Explicit axes want a sharding for every reshape of a lowering.
    explicit = any(explicit_sharding(jax.typeof(a)) is not None for a in arrays)
    # JAX cannot transpose a sum of several arrays at once.
    if empty or explicit or is_transposing() or _forced.value == "xla":
        return by_xla(*arrays)
    if _forced.value is not None:
        return by_shape(*arrays)
    return by_platform(*arrays, cpu=by_shape, default=by_xla)
