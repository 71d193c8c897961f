"""The catalogue's entries of the recurrent family.

Times and memory, where they are given, are those of value and gradient on a CPU with two cores, 256
features in and out, 16 sequences of 256 steps: nnx.RNN around the cell of nnx -> RNN around ours.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.layers.recurrent.bidirectional import Bidirectional
from flax_customgrad.layers.recurrent.gru import GRUCell
from flax_customgrad.layers.recurrent.linear_recurrence import linear_recurrence, recur
from flax_customgrad.layers.recurrent.lru import LRU
from flax_customgrad.layers.recurrent.lstm import LSTMCell, OptimizedLSTMCell
from flax_customgrad.layers.recurrent.min_gru import MinGRU
from flax_customgrad.layers.recurrent.recurrence import recurrence
from flax_customgrad.layers.recurrent.rnn import RNN
from flax_customgrad.layers.recurrent.simple import SimpleCell
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, applied, made, normal


def _over_time(cell: Any, *carry_and_inputs: jax.Array) -> Any:
    """The last carry and the outputs."""
    *carry, x = carry_and_inputs
    rnn = RNN(cell, rngs=False, return_carry=True)
    return rnn(x, initial_carry=tuple(carry) if len(carry) > 1 else carry[0])


def _from_zero(cell: Any, x: jax.Array) -> Any:
    """The outputs for a carry of zeros, by the RNN of the cell's own library."""
    rnn = RNN if type(cell).__module__.partition(".")[0] == "flax_customgrad" else nnx.RNN
    shape = (*x.shape[:-2], cell.hidden_features)
    zeros = jnp.zeros(shape, x.dtype)
    carry = (zeros, zeros) if isinstance(cell, nnx.LSTMCell | nnx.OptimizedLSTMCell) else zeros
    return rnn(cell, rngs=False)(x, initial_carry=carry)


def _one_step(cell: Any, *carry_and_inputs: jax.Array) -> Any:
    *carry, x = carry_and_inputs
    return cell(tuple(carry) if len(carry) > 1 else carry[0], x)


def _state() -> jax.Array:
    return normal(8, 4)


def _memory() -> jax.Array:
    return 2 * normal(8, 4)[::-1]


def _sequences() -> jax.Array:
    return normal(8, 2, 3)


def _examples(*carry: Callable[[], jax.Array], **kwargs: Any) -> dict[str, Example]:
    """Those of a cell: over time, and one step of it."""
    kwargs = {**RANDOM_BIAS, **kwargs}
    return {
        "two steps in an RNN": made(3, 4, **kwargs, call=_over_time, inputs=(*carry, _sequences)),
        "one step": made(3, 4, **kwargs, call=_one_step, inputs=(*carry, lambda: normal(8, 3))),
    }


def _workloads(**kwargs: Any) -> dict[str, Example]:
    def of(n: int, t: int, b: int) -> Example:
        return made(n, n, **kwargs, call=_from_zero, inputs=(lambda: normal(b, t, n),))

    return {"16x256x256": of(256, 256, 16), "64x64x128": of(128, 64, 64)}


def _of_library(cls: Any) -> tuple[Any, Any]:
    """RNN and GRUCell of the library that a class is of."""
    return (RNN, GRUCell) if cls in (RNN, Bidirectional) else (nnx.RNN, nnx.GRUCell)


def _rnn(call: Any, *inputs: Any, features: tuple[int, int] = (3, 4)) -> Example:
    """An RNN around a GRUCell."""

    def make(cls: Any) -> tuple[Any, ...]:
        _, cell = _of_library(cls)
        layer = cls(cell(*features, **RANDOM_BIAS, rngs=nnx.Rngs(0)), rngs=False)
        return (call, layer, *(x() for x in inputs))

    return make


def _bidirectional(call: Any, *inputs: Any, features: tuple[int, int] = (3, 4)) -> Example:
    """Two RNN, each around a GRUCell."""

    def make(cls: Any) -> tuple[Any, ...]:
        rnn, cell = _of_library(cls)
        both = (rnn(cell(*features, **RANDOM_BIAS, rngs=nnx.Rngs(i)), rngs=False) for i in range(2))
        return (call, cls(*both, rngs=False), *(x() for x in inputs))

    return make


def _lengths() -> jax.Array:
    return jnp.asarray([1, 2, 2, 1, 2, 1, 1, 2])


def _reversed(rnn: Any, h: jax.Array, lengths: jax.Array, x: jax.Array) -> Any:
    return rnn(
        x,
        initial_carry=h,
        seq_lengths=lengths,
        reverse=True,
        keep_order=True,
        return_carry=True,
    )


def _both_ways(layer: Any, h: jax.Array, lengths: jax.Array, x: jax.Array) -> Any:
    return layer(x, initial_carry=(h, h[::-1]), seq_lengths=lengths, return_carry=True)


def _of_zeros(layer: Any, x: jax.Array) -> Any:
    h = jnp.zeros((len(x), x.shape[-1]), x.dtype)
    return layer(x, initial_carry=(h, h) if isinstance(layer, nnx.Bidirectional) else h)


def _complex(recurrence: Any) -> Any:
    """A function of real arrays that calls the recurrence on complex ones."""

    def call(a: jax.Array, b: jax.Array, h0: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b, h0 = (lax.complex(*jnp.split(array, 2, axis=-1)) for array in (a, b, h0))
        h = recurrence(a, b, h0, reverse=True)
        return jnp.real(h), jnp.imag(h)

    return call


def _complex_example(function: Any) -> tuple[Any, ...]:
    return _complex(function), normal(2, 6), normal(8, 2, 6), normal(8, 6)


def _run(cell: Any, x: jax.Array) -> jax.Array:
    return RNN(cell, rngs=False)(x)


_LSTM = {
    "keeps": "x, c, h and the gates",
    "gain": "one product for the gradient of each kernel; float32 sums over time",
    "source": "https://doi.org/10.1162/neco.1997.9.8.1735",
}

ENTRIES = (
    Entry(
        "OptimizedLSTMCell",
        "recurrent",
        OptimizedLSTMCell,
        nnx.OptimizedLSTMCell,
        "exact",
        **_LSTM,
        examples=_examples(_memory, _state),
        operations={recurrence: "two steps in an RNN"},
        workloads=_workloads(),
    ),
    Entry(
        "LSTMCell",
        "recurrent",
        LSTMCell,
        nnx.LSTMCell,
        "exact",
        **_LSTM,
        examples=_examples(_memory, _state),
        workloads=_workloads(),
    ),
    Entry(
        "GRUCell",
        "recurrent",
        GRUCell,
        nnx.GRUCell,
        "exact",
        keeps="x, h, the gates, and h U of the new state",
        gain="one product for the gradient of each kernel; float32 sums over time",
        source="arXiv:1406.1078",
        examples=_examples(_state),
        workloads=_workloads(),
    ),
    Entry(
        "SimpleCell",
        "recurrent",
        SimpleCell,
        nnx.SimpleCell,
        "exact",
        keeps="x and h",
        gain="one product for the gradient of each kernel; float32 sums over time",
        source="https://doi.org/10.1207/s15516709cog1402_1",
        examples={
            **_examples(_state, residual=True),
            "relu": made(
                3,
                4,
                **RANDOM_BIAS,
                activation_fn=nnx.relu,
                call=_over_time,
                inputs=(_state, _sequences),
            ),
        },
        workloads=_workloads(),
    ),
    Entry(
        "RNN",
        "recurrent",
        RNN,
        nnx.RNN,
        "exact",
        keeps="what its cell keeps",
        gain="runs a cell of this library as one operation over time",
        examples={
            "reversed, of several lengths": _rnn(_reversed, _state, _lengths, _sequences),
        },
        workloads={
            "GRU, 16x256x256": _rnn(_of_zeros, lambda: normal(16, 256, 256), features=(256, 256)),
        },
    ),
    Entry(
        "Bidirectional",
        "recurrent",
        Bidirectional,
        nnx.Bidirectional,
        "exact",
        keeps="what its two layers keep",
        gain="runs two RNN of this library",
        examples={
            "of several lengths": _bidirectional(_both_ways, _state, _lengths, _sequences),
        },
        workloads={
            "GRU, 16x128x256": _bidirectional(
                _of_zeros, lambda: normal(16, 128, 256), features=(256, 256)
            ),
        },
    ),
    Entry(
        "linear_recurrence",
        "recurrent",
        linear_recurrence,
        None,
        "exact",
        keeps="a, h and h0",
        gain="one reversed recurrence; autodiff of an associative scan keeps two arrays per level",
        examples={
            "a state to start with": applied(
                lambda: normal(2, 4), lambda: normal(8, 2, 4), lambda: normal(8, 4)
            ),
            "complex, from the last step": _complex_example,
        },
        operations={recur: "a state to start with"},
        workloads={
            "16x1024x256": applied(
                lambda: jax.nn.sigmoid(normal(16, 1024, 256)), lambda: normal(16, 1024, 256)
            ),
        },
    ),
    Entry(
        "LRU",
        "recurrent",
        LRU,
        None,
        "exact",
        keeps="x, B x and h",
        gain="all steps at once in an RNN; stable whatever is learned",
        source="arXiv:2303.06349",
        examples={
            "in an RNN": made(3, 5, r_min=0.5, call=_run, inputs=(lambda: normal(8, 4, 3),)),
        },
        workloads={
            "16x1024x256": made(256, 256, call=_run, inputs=(lambda: normal(16, 1024, 256),)),
        },
    ),
    Entry(
        "MinGRU",
        "recurrent",
        MinGRU,
        None,
        "exact",
        keeps="x, the gates and h",
        gain="all steps at once in an RNN; states in float32",
        source="arXiv:2410.01201",
        examples={
            "in an RNN": made(3, 5, **RANDOM_BIAS, call=_run, inputs=(lambda: normal(8, 4, 3),)),
        },
        workloads={
            "16x1024x256": made(256, 256, call=_run, inputs=(lambda: normal(16, 1024, 256),)),
        },
    ),
)
