"""The noise of stochastic rounding: a stream of its own for each layer."""

from flax import nnx


def fork_stream(drawing: str, collection: str, rngs: nnx.Rngs | None) -> nnx.RngStream:
    """Forks a stream of random numbers.

    Args:
        drawing: what draws from it, for the error: a layer and its argument.
        collection: the stream of `rngs` to fork.
        rngs: the streams.

    Returns:
        The new stream.

    Raises:
        ValueError: `rngs` is None.
    """
    if rngs is None:
        raise ValueError(f"{drawing} draws noise: write rngs=nnx.Rngs(0)")
    return rngs[collection].fork()
