"""The choice of lowering: which recipe computes a convolution and its gradients, by its shape.

On a CPU each of the three passes goes through the table below, by the first row that fits. Grouped
and transposed convolutions are taken apart, and their parts go through the table again. Of the 78
shapes of `benchmarks.convolutions` none took 1.05 times as long as by XLA. Elsewhere it is XLA's
own, with the gradients that JAX has for it. `jax.lax.platform_dependent` decides when a program is
lowered, so an exported program chooses where it runs.

    patch        windows that do not overlap, and 1 x 1    one matrix product
    depthwise    groups of one or two features             shifted copies, blockwise sums
    grouped      other groups                              16 features at a time, block-diagonal
    transposed   an input spread out                       a convolution for each phase
    dense        what is left                              XLA's, its dW in the fast layout
    xla          strides and spread input at once          XLA's and JAX's own
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.recipes import dense, depthwise, grouped, patches, transposed
from flax_customgrad.layers.conv.recipes import xla_convolution as xla
from flax_customgrad.layers.conv.recipes.geometry import ConvPass, Geometry, mirrored
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.sharding import explicit_sharding, varying_like


@dataclass(frozen=True)
class Recipe:
    """A way to compute the two maps of `geometry`.

    Attributes:
        fits: whether it computes a convolution of that geometry.
        correlate: y from x and the kernel.
        kernel_gradient: the gradient of the kernel from x and g.
    """

    fits: Callable[[Geometry], bool]
    correlate: ConvPass
    kernel_gradient: ConvPass


def _correlate(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    return RECIPES[chosen(geometry)].correlate(x, w, geometry)


def _kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    return RECIPES[chosen(geometry)].kernel_gradient(x, g, geometry)


def _always(geometry: Geometry) -> bool:
    return True


def _jax_kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    shape = (*geometry.window, geometry.in_features // geometry.groups, geometry.out_features)
    return xla.kernel_gradient(x, g, geometry, jnp.zeros_like(x, shape=shape))


RECIPES = {
    "patch": Recipe(patches.fits, patches.correlate, patches.kernel_gradient),
    "depthwise": Recipe(depthwise.fits, depthwise.correlate, depthwise.kernel_gradient),
    "transposed": Recipe(
        transposed.fits,
        functools.partial(transposed.correlate, part=_correlate),
        functools.partial(transposed.kernel_gradient, part=_kernel_gradient),
    ),
    "grouped": Recipe(
        grouped.fits,
        functools.partial(grouped.correlate, part=_correlate),
        functools.partial(grouped.kernel_gradient, part=_kernel_gradient),
    ),
    "dense": Recipe(dense.fits, dense.correlate, dense.kernel_gradient),
    "xla": Recipe(_always, xla.correlate, _jax_kernel_gradient),
}

# A context that JAX itself knows of: what was traced in one is not taken for the other.
_forced = jax.make_user_context(default_value=None)


def use_lowering(name: str) -> AbstractContextManager[None]:
    """Forces one recipe on every convolution whose shape it fits, and XLA's own on all others.

    For a comparison, or to see whether a recipe is to blame. It holds on every platform.

    Args:
        name: "patch", "depthwise", "grouped", "transposed", "dense" or "xla".

    Returns:
        A context manager. It acts on the thread that enters it, and on what is traced in it.

    Raises:
        ValueError: there is no such recipe; the error lists them.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> conv = fcg.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> with fcg.use_lowering("xla"):
        ...     y = conv(jnp.ones((2, 8, 8, 3)))
    """
    if name not in RECIPES:
        raise ValueError(f"no lowering {name!r}; there are {', '.join(RECIPES)}")
    return _forced(name)


def chosen(geometry: Geometry) -> str:
    """The name of the recipe for a shape on a CPU, or of the one that is forced.

    Args:
        geometry: any; not empty.
    """
    if _forced.value is not None:
        return _forced.value if RECIPES[_forced.value].fits(geometry) else "xla"
    return next(name for name, recipe in RECIPES.items() if recipe.fits(geometry))


# One call, and traced once for each shape, also outside of any jit.
_once = functools.partial(jax.jit, inline=True)


@functools.partial(_once, static_argnums=(2, 3, 4, 5))
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
    how = {"preferred_element_type": dtype, "precision": precision, "out_sharding": out_sharding}

    def by_recipe(x: jax.Array, w: jax.Array) -> jax.Array:
        wide = accumulator(x, dtype or x.dtype)
        return _correlate(x.astype(wide), w.astype(wide), geometry).astype(dtype or x.dtype)

    def by_xla(x: jax.Array, w: jax.Array) -> jax.Array:
        return xla.correlate(x, w, geometry, **how)

    return _on_this_platform(geometry, by_recipe, by_xla, x, w)


@functools.partial(_once, static_argnums=(3, 4))
def gradients(
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

    def by_recipe(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = x.dtype
        x, w, g = (a.astype(wide) for a in (x, w, g))
        dx = _correlate(g, mirrored(w, geometry.groups), geometry.transposed)
        return dx.astype(dtype), _kernel_gradient(x, g, geometry)

    def by_xla(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The kernel of each device: its gradient is summed later.
        g, w = g.astype(x.dtype), varying_like(w, g)
        dx = xla.input_gradient(g, w, geometry, x, precision=precision)
        return dx, xla.kernel_gradient(x, g, geometry, w, precision=precision).astype(wide)

    return _on_this_platform(geometry, by_recipe, by_xla, x, w, g)


def _on_this_platform(
    geometry: Geometry, by_recipe: Callable[..., Any], by_xla: Callable[..., Any], *arrays: Any
) -> Any:
    empty = 0 in geometry.out or any(0 in a.shape for a in arrays)
    # Explicit axes want a sharding for every reshape of a recipe.
    explicit = any(explicit_sharding(jax.typeof(a)) is not None for a in arrays)
    if empty or explicit or _forced.value == "xla":
        return by_xla(*arrays)
    if _forced.value is not None:
        return by_recipe(*arrays)
    return lax.platform_dependent(*arrays, cpu=by_recipe, default=by_xla)
