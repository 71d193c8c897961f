"""Eight decoder blocks in a scan: the time of their gradient beside its memory.

python -m benchmarks.scanned_decoder [--rounds N] [--layers N] [--json FILE]

    ms        value and gradient, jitted
    x         the time of the blocks of nnx divided by that of this form, median and quartiles
    MB        temporary memory, most of it what the backward keeps of each block

A block is RMSNorm, causal attention of 8 heads, RMSNorm and SwiGLU, of width 512 and 1408, over two
texts of 1024 tokens. `jax.checkpoint` computes again all of a block, or its feed-forward network.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.paired import paired, pin_allocator


@dataclass(frozen=True)
class Row:
    """One form of the blocks.

    Attributes:
        form: its name.
        milliseconds: the median time of value and gradient.
        ratio: the time of the blocks of nnx divided by it, the median of pairs.
        low: the lower quartile of that ratio.
        high: the upper quartile.
        megabytes: the temporary memory.
    """

    form: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    megabytes: float


class Block(nnx.Module):
    """Attention and a gated feed-forward network, each behind an RMSNorm."""

    def __init__(self, rngs: nnx.Rngs, width: int = 512, heads: int = 8, hidden: int = 1408):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def attend(self, x: jax.Array) -> jax.Array:
        """The first half, of `x` of shape (batch, length, width)."""
        return x + self.attention(self.norm1(x), is_causal=True)

    def feed(self, x: jax.Array) -> jax.Array:
        """The second half."""
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


Half = Callable[[Block, jax.Array], jax.Array]
Checkpoint = Callable[[Half], Half]


def _whole(half: Half) -> Half:
    return half


def value_and_grad(
    block: Block,
    layers: int,
    around_block: Checkpoint,
    around_feed: Checkpoint,
    shape: tuple[int, ...] = (2, 1024, 512),
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The value and gradient of blocks in a scan, and their arguments.

    Args:
        block: the first of them; the others are multiples of it.
        layers: how many there are.
        around_block: what a block is called through.
        around_feed: what its feed-forward network is called through.
        shape: of the input of the first, (batch, length, width).
    """
    graphdef, state = nnx.split(block)
    factors = 1 + 0.01 * jnp.arange(layers)
    stacked = jax.tree.map(lambda v: factors.reshape(-1, *(1,) * v.ndim) * v, state)
    x, weights = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    feed = around_feed(lambda state, x: nnx.merge(graphdef, state).feed(x))
    block_of = around_block(lambda state, x: feed(state, nnx.merge(graphdef, state).attend(x)))

    def loss(stacked: Any, x: jax.Array) -> jax.Array:
        y, _ = lax.scan(lambda x, state: (block_of(state, x), None), x, stacked)
        return jnp.sum(y * weights)

    return jax.value_and_grad(loss, (0, 1)), (stacked, x)


FORMS: Mapping[str, tuple[bool, Checkpoint, Checkpoint]] = {
    "flax.nnx": (False, _whole, _whole),
    "flax.nnx, checkpoints of blocks": (False, jax.checkpoint, _whole),
    "converted": (True, _whole, _whole),
    "converted, checkpoints of feed-forward networks": (True, _whole, jax.checkpoint),
    "converted, checkpoints of blocks": (True, jax.checkpoint, _whole),
}


def measure(layers: int, rounds: int) -> list[Row]:
    """Compiles all forms and times them in turn.

    Args:
        layers: how many blocks there are.
        rounds: how often each is called.
    """
    calls, megabytes = {}, {}
    for form, (is_ours, *around) in FORMS.items():
        block = Block(nnx.Rngs(0))
        context: AbstractContextManager[Any] = nullcontext()
        if is_ours:
            fcg.convert(block)
            context = fcg.functions()
        function, arguments = value_and_grad(block, layers, *around)
        with context:
            compiled = jax.jit(function).lower(*arguments).compile()
        megabytes[form] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        calls[form] = lambda f=compiled, a=arguments: f(*a)
    return [
        Row(form, t.milliseconds, t.ratio, t.low, t.high, megabytes[form])
        for form, t in paired(calls, 0, rounds).items()
    ]


def main() -> None:
    """Prints a line per form."""
    pin_allocator("benchmarks.scanned_decoder")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each form is timed")
    parser.add_argument("--layers", type=int, default=8, help="how many blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to save the rows")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    rows = measure(args.layers, args.rounds)
    for row in rows:
        print(
            f"{row.form:48} {row.milliseconds:7.0f} ms  x{row.ratio:.2f} "
            f"[{row.low:.2f}, {row.high:.2f}]  {row.megabytes:6.0f} MB"
        )
    if args.json is not None:
        measurements.write(args.json, map(dataclasses.asdict, rows))


if __name__ == "__main__":
    main()
