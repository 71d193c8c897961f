"""`recurrence`: the operation of every recurrent cell over time, and its gradient.

    forward   a_t   = x_t W                           of all steps one product, before the scan,
                                                      if there is a backward to come
              u_t   = h_{t-1} U                       the bias b is added to a_t or to u_t
              s_t   = step(a_t, u_t, s_{t-1})         the states of the cell; h_t is the last
    backward  da_t, ds_{t-1} = step.backward(ds_t + the cotangent of s_t),  du_t from da_t
              dh_{t-1} = ... + du_t U^T               the one product within the scan
              dx_t  = da_t W^T
              dW    = sum_t x_t^T da_t                each sum one product, after the scan
              dU    = sum_t h_{t-1}^T du_t
              db    = sum_t da_t
    kept      x, s_0 and the parameters, as they came; s_t, which the caller has; what the step
              keeps: the gates

Autodiff of a scan adds to dW and dU in every step, and keeps up to twice as many arrays. Sums over
time run in float32, where in bfloat16 it loses what is small beside the sum. A cell alone is a
recurrence of one step, without a scan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.recurrent.cell_step import States, Step
from flax_customgrad.numerics.accumulation import accumulator, total
from flax_customgrad.numerics.dtypes import in_dtype
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient
from flax_customgrad.numerics.sharding import explicit_spec, varying_alike, with_auto_axes


@dataclass(frozen=True)
class RecurrenceConfig:
    """The choices of a recurrence that are not arrays.

    Attributes:
        product: dtype and precision of the products.
        gates: what the names of the parameters of each gate end in, ("_i", "_f", "_g", "_o") where
            there are W_i and so on; ("",) where one W has those of all.
        unroll: how many steps an iteration of the compiled loop takes.
        one_step: whether there is one step, and no axis of time in x and in the states.
    """

    product: MatmulConfig
    gates: tuple[str, ...] = ("",)
    unroll: int = 1
    one_step: bool = False

    def time_in_front(self, array: jax.Array) -> jax.Array:
        """An array of shape (..., T, features) as (T, ..., features)."""
        return array[None] if self.one_step else jnp.moveaxis(array, -2, 0)

    def time_in_place(self, array: jax.Array) -> jax.Array:
        """The inverse of `time_in_front`."""
        return array[0] if self.one_step else jnp.moveaxis(array, 0, -2)

    def join(self, params: Parameters, name: str) -> jax.Array:
        """The parameters W, U or b of all gates, one beside the other."""
        parts = [params[name + gate] for gate in self.gates]
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def split(self, name: str, gradient: jax.Array) -> dict[str, jax.Array]:
        """The gradient of W, U or b, for the parameters that were joined."""
        parts = jnp.split(gradient, len(self.gates), axis=-1)
        return {name + gate: part for gate, part in zip(self.gates, parts, strict=True)}


class Residuals(NamedTuple):
    """What the backward of `recurrence` keeps.

    Attributes:
        states: s_1 to s_T; None where there is one step.
        kept: what each step keeps, arrays of shape (T, ..., features).
    """

    params: Parameters
    carry: States
    x: jax.Array
    states: States | None
    kept: States
    step: Step
    config: RecurrenceConfig


@custom_vjp(leading_axes=True)
def recurrence(
    params: Parameters, carry: States, x: jax.Array, step: Step, config: RecurrenceConfig
) -> States:
    """Runs a cell over time.

    Args:
        params: `W` of shape (in_features, blocks * features), `U` of shape (features, blocks *
            features) and `b` of shape (blocks * features,), float, or those of each gate.
        carry: the states to start with, each (..., features), float.
        x: inputs of shape (..., T, in_features), float, or (..., in_features) with
            `config.one_step`; T is at least 1.
        step: the cell.
        config: dtype and the rest.

    Returns:
        The states of all steps, each of shape (..., T, features), or (..., features).
    """
    return _run(params, carry, x, step, config, keeps=False)[0]


def _fwd(
    params: Parameters, carry: States, x: jax.Array, step: Step, config: RecurrenceConfig
) -> tuple[States, Residuals]:
    states, kept = _run(params, carry, x, step, config, keeps=True)
    later = None if len(kept[0]) == 1 else states
    return states, Residuals(params, carry, x, later, kept, step, config)


def _bwd(res: Residuals, g: States) -> tuple[nnx.State, States, jax.Array, None, None]:
    batch, steps = res.carry[0].shape[:-1], len(res.kept[0])
    chex.assert_shape(g, (*res.x.shape[:-1], None))
    chex.assert_shape(res.kept, (steps, *batch, None))
    specs = (
        {name: explicit_spec(param) for name, param in res.params.items()},
        jax.tree.map(explicit_spec, res.carry),
        explicit_spec(res.x),
    )
    arrays = res._replace(step=None, config=None)
    grads, dcarry, dx = with_auto_axes(
        lambda arrays, g: _cotangents(arrays, g, res.step, res.config), specs, arrays, g
    )
    chex.assert_trees_all_equal_shapes(grads, dict(res.params))
    chex.assert_trees_all_equal_shapes((dcarry, dx), (res.carry, res.x))
    return nnx.State(grads), dcarry, dx, None, None


recurrence.defvjp(_fwd, _bwd)


def _run(
    params: Parameters,
    carry: States,
    x: jax.Array,
    step: Step,
    config: RecurrenceConfig,
    keeps: bool,
) -> tuple[States, States]:
    """The states of all steps, and what each of them keeps."""

    def run(params: Parameters, carry: States, x: jax.Array) -> tuple[States, States]:
        params, carry, x = varying_alike((params, carry, x))
        x, W, U, b = _promoted(params, carry, x, step, config)

        def advance(states: States, a: jax.Array) -> tuple[States, tuple[States, States]]:
            u = _project(in_dtype(states[-1], U.dtype), U, config)
            a, u = (a + b, u) if step.bias == "input" else (a, u + b)
            states, kept = step.forward(a, u, states)
            return states, (states, kept if keeps else ())

        def projected_at_once(x: jax.Array) -> Any:
            return over_time(advance, carry, _project(x, W, config), config.unroll)

        def projected_in_steps(x: jax.Array) -> Any:
            return over_time(
                lambda states, x: advance(states, _project(x, W, config)), carry, x, config.unroll
            )

        if keeps:
            _, (states, kept) = projected_at_once(x)
        else:
            # A CPU computes the projection of a step faster than it reads it from that of all.
            _, (states, kept) = lax.platform_dependent(
                x, cpu=projected_in_steps, default=projected_at_once
            )
        return tuple(map(config.time_in_place, states)), kept

    *rows, _ = explicit_spec(x)
    batch = rows if config.one_step else rows[:-1]
    specs = (PartitionSpec(*rows, None), PartitionSpec(None, *batch, None))
    return with_auto_axes(run, specs, params, carry, x)


def _cotangents(
    res: Residuals, g: States, step: Step, config: RecurrenceConfig
) -> tuple[dict[str, jax.Array], States, jax.Array]:
    """Those of the parameters, of the states to start with, and of x."""
    res, g = varying_alike((res, g))
    x, W, U, _ = _promoted(res.params, res.carry, res.x, step, config)
    g = tuple(map(config.time_in_front, g))
    before = tuple(s[None] for s in res.carry)
    if res.states is not None:
        later = map(config.time_in_front, res.states)
        before = tuple(map(lambda s, t: jnp.concatenate([s, t[:-1]]), before, later))
    wide = accumulator(*before, *g, *res.kept)
    precision = config.product.precision

    def retreat(d: States, xs: tuple[States, States, States]) -> tuple[States, jax.Array]:
        g, states, kept = jax.tree.map(lambda a: in_dtype(a, wide), xs)
        d = tuple(a + b for a, b in zip(d, g, strict=True))
        da, (*others, dh) = step.backward(kept, states, d)
        du = in_dtype(step.of_hidden(da, kept), U.dtype)
        over_u = (((du.ndim - 1,), (1,)), ((), ()))
        dh = dh + lax.dot_general(du, U, over_u, precision, preferred_element_type=wide)
        return (*others, dh), in_dtype(da, W.dtype)

    zeros = tuple(jnp.zeros_like(s, wide) for s in res.carry)
    dcarry, da = over_time(retreat, zeros, (g, before, res.kept), config.unroll, reverse=True)
    h, du = in_dtype(before[-1], U.dtype), in_dtype(step.of_hidden(da, res.kept), U.dtype)
    rows = tuple(range(x.ndim - 1))
    over_rows, over_a = ((rows, rows), ((), ())), (((x.ndim - 1,), (1,)), ((), ()))
    grads = {
        **config.split("W", parameter_gradient(x, da, over_rows, like=W, precision=precision)),
        **config.split("U", parameter_gradient(h, du, over_rows, like=U, precision=precision)),
        **config.split("b", total(da, rows)),
    }
    dx = input_gradient(da, W, over_a, like=res.x, precision=precision)
    return grads, dcarry, config.time_in_place(dx)


def _promoted(
    params: Parameters, carry: States, x: jax.Array, step: Step, config: RecurrenceConfig
) -> tuple[jax.Array, ...]:
    """X with time in front, W, U and b, as the two Linear layers of nnx's cell promote them."""
    W, U, b = (config.join(params, name) for name in "WUb")
    promote = config.product.promote
    if step.bias == "input":
        (x, W, b), (_, U) = promote(x, W, b), promote(carry[-1], U)
    else:
        (x, W), (_, U, b) = promote(x, W), promote(carry[-1], U, b)
    return config.time_in_front(x), W, U, b


def _project(x: jax.Array, kernel: jax.Array, config: RecurrenceConfig) -> jax.Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), config.product.precision)


def over_time(
    function: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    unroll: int = 1,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, without a loop for one step, which may change the dtype of the carry.

    Args:
        function: takes the carry and the slices of one step; returns the carry and its outputs.
        carry: a tree of arrays.
        xs: a tree of arrays with time in front.
        unroll: how many steps an iteration of the compiled loop takes.
        reverse: whether the last step comes first.

    Returns:
        The last carry, and the outputs with time in front.
    """
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(function, carry, xs, unroll=unroll, reverse=reverse)
    carry, ys = function(carry, jax.tree.map(lambda a: a[0], xs))
    return carry, jax.tree.map(lambda a: a[None], ys)
