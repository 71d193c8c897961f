"""The noise of stochastic rounding: a stream of its own for each layer."""

from flax import nnx


def fork_stream(drawing: str, collection: str, rngs: nnx.Rngs | None) -> nnx.RngStream:
    """A stream to draw from, forked off.

    Args:
        drawing: what draws from it, for the error: a layer and its argument.
        collection: the stream of `rngs` to fork.
        rngs: the streams.

    Raises:
        ValueError: there are none.
    """
    if rngs is None:
        raise ValueError(f"{drawing} draws noise: write rngs=nnx.Rngs(0)")
    return rngs[collection].fork()
