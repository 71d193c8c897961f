"""The catalogue's entries of the recurrent family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.layers.recurrent.bidirectional import Bidirectional
from flax_customgrad.layers.recurrent.gru import GRUCell
from flax_customgrad.layers.recurrent.linear_cell import LinearCell
from flax_customgrad.layers.recurrent.linear_recurrence import linear_recurrence, recur
from flax_customgrad.layers.recurrent.lru import LRU
from flax_customgrad.layers.recurrent.lstm import LSTMCell, OptimizedLSTMCell
from flax_customgrad.layers.recurrent.min_gru import MinGRU
from flax_customgrad.layers.recurrent.recurrence import recurrence
from flax_customgrad.layers.recurrent.rnn import RNN
from flax_customgrad.layers.recurrent.simple import SimpleCell
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, applied, made, normal


def _zeros(cell: Any, x: jax.Array) -> Any:
    """What a cell starts with, in the dtype of the inputs."""
    h = jnp.zeros((*x.shape[:-2], cell.hidden_features), x.dtype)
    return (h, h) if isinstance(cell, nnx.LSTMCell | nnx.OptimizedLSTMCell) else h


def _run(cell: Any, x: jax.Array) -> Any:
    """The outputs over time, by the RNN of the library that a cell is of."""
    is_ours = type(cell).__module__.partition(".")[0] == "flax_customgrad"
    layer = (RNN if is_ours else nnx.RNN)(cell, rngs=False)
    return layer(x, initial_carry=None if isinstance(cell, LinearCell) else _zeros(cell, x))


def _step(cell: Any, h: jax.Array, x: jax.Array) -> Any:
    return cell(h, x)


def _lstm_step(cell: Any, c: jax.Array, h: jax.Array, x: jax.Array) -> Any:
    return cell((c, h), x)


def _state() -> jax.Array:
    return normal(8, 4)


def _memory() -> jax.Array:
    return 2 * normal(8, 4)[::-1]


def _inputs() -> jax.Array:
    return normal(8, 3)


_ONE_LSTM_STEP = {
    "one step": made(3, 4, **RANDOM_BIAS, call=_lstm_step, inputs=(_memory, _state, _inputs))
}
_ONE_STEP = {"one step": made(3, 4, **RANDOM_BIAS, call=_step, inputs=(_state, _inputs))}
_WORKLOADS = {
    "16x256x256": made(256, 256, call=_run, inputs=(lambda: normal(16, 256, 256),)),
    "64x64x128": made(128, 128, call=_run, inputs=(lambda: normal(64, 64, 128),)),
}


def _cells_of(cls: Any, features: tuple[int, int]) -> list[Any]:
    """Two SimpleCells, of the library that a class is of."""
    cell = SimpleCell if cls in (RNN, Bidirectional) else nnx.SimpleCell
    return [cell(*features, **RANDOM_BIAS, rngs=nnx.Rngs(i)) for i in range(2)]


def _around_one(call: Any, *inputs: Any, features: tuple[int, int] = (3, 4)) -> Example:
    """An RNN."""

    def make(cls: Any) -> tuple[Any, ...]:
        cell, _ = _cells_of(cls, features)
        return (call, cls(cell, rngs=False), *(x() for x in inputs))

    return make


def _around_two(call: Any, *inputs: Any, features: tuple[int, int] = (3, 4)) -> Example:
    """A Bidirectional."""

    def make(cls: Any) -> tuple[Any, ...]:
        rnn = RNN if cls is Bidirectional else nnx.RNN
        ahead, back = (rnn(cell, rngs=False) for cell in _cells_of(cls, features))
        return (call, cls(ahead, back, rngs=False), *(x() for x in inputs))

    return make


def _reversed(rnn: Any, h: jax.Array, x: jax.Array) -> Any:
    return rnn(x, initial_carry=h, reverse=True, keep_order=True, return_carry=True)


def _both_ways(layer: Any, h: jax.Array, x: jax.Array) -> Any:
    return layer(x, initial_carry=(h, h[::-1]), return_carry=True)


def _outputs(rnn: Any, x: jax.Array) -> Any:
    return rnn(x, initial_carry=_zeros(rnn.cell, x))


def _outputs_of_both(layer: Any, x: jax.Array) -> Any:
    h = _zeros(layer.forward_rnn.cell, x)
    return layer(x, initial_carry=(h, h))


def _complex(recurrence: Any) -> Any:
    """A function of real arrays that calls the recurrence on complex ones."""

    def call(a: jax.Array, b: jax.Array, h0: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b, h0 = (lax.complex(*jnp.split(array, 2, axis=-1)) for array in (a, b, h0))
        h = recurrence(a, b, h0, reverse=True)
        return jnp.real(h), jnp.imag(h)

    return call


def _complex_example(function: Any) -> tuple[Any, ...]:
    return _complex(function), normal(2, 6), normal(8, 2, 6), normal(8, 6)


_GAIN = "one product for the gradient of each kernel; float32 sums over time"
_LSTM_KEEPS, _LSTM_SOURCE = "x, c, h and the gates", "https://doi.org/10.1162/neco.1997.9.8.1735"

ENTRIES = (
    Entry(
        "OptimizedLSTMCell",
        "recurrent",
        OptimizedLSTMCell,
        nnx.OptimizedLSTMCell,
        "exact",
        keeps=_LSTM_KEEPS,
        gain=_GAIN,
        source=_LSTM_SOURCE,
        examples=_ONE_LSTM_STEP,
        workloads=_WORKLOADS,
    ),
    Entry(
        "LSTMCell",
        "recurrent",
        LSTMCell,
        nnx.LSTMCell,
        "exact",
        keeps=_LSTM_KEEPS,
        gain=_GAIN,
        source=_LSTM_SOURCE,
        examples=_ONE_LSTM_STEP,
        workloads=_WORKLOADS,
    ),
    Entry(
        "GRUCell",
        "recurrent",
        GRUCell,
        nnx.GRUCell,
        "exact",
        keeps="x, h, the gates, and h U of the new state",
        gain=_GAIN,
        source="arXiv:1406.1078",
        examples=_ONE_STEP,
        workloads=_WORKLOADS,
    ),
    Entry(
        "SimpleCell",
        "recurrent",
        SimpleCell,
        nnx.SimpleCell,
        "exact",
        keeps="x and h",
        gain=_GAIN,
        source="https://doi.org/10.1207/s15516709cog1402_1",
        examples={
            "one step, residual": made(
                3, 4, residual=True, **RANDOM_BIAS, call=_step, inputs=(_state, _inputs)
            ),
        },
        workloads=_WORKLOADS,
    ),
    Entry(
        "RNN",
        "recurrent",
        RNN,
        nnx.RNN,
        "exact",
        keeps="what its cell keeps",
        gain="runs a cell of this library as one operation over time",
        examples={"two steps, reversed": _around_one(_reversed, _state, lambda: normal(8, 2, 3))},
        operations={recurrence: "two steps, reversed"},
        workloads={
            "16x256x256": _around_one(_outputs, lambda: normal(16, 256, 256), features=(256, 256)),
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
        examples={"one step": _around_two(_both_ways, _state, lambda: normal(8, 1, 3))},
        workloads={
            "16x128x256": _around_two(
                _outputs_of_both, lambda: normal(16, 128, 256), features=(256, 256)
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
            "in an RNN": made(3, 5, r_min=0.5, call=_run, inputs=(lambda: normal(8, 2, 3),)),
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
            "in an RNN": made(3, 5, **RANDOM_BIAS, call=_run, inputs=(lambda: normal(8, 2, 3),)),
        },
        workloads={
            "16x1024x256": made(256, 256, call=_run, inputs=(lambda: normal(16, 1024, 256),)),
        },
    ),
)
