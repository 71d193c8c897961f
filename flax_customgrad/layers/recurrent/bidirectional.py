"""Bidirectional: one RNN from the first step to the last, another from the last to the first.

forward   y = merge(forward_rnn(x), backward_rnn(x reversed, its outputs in the order of x))
backward  composed: that of both
kept      what both keep
"""

from flax import nnx


class Bidirectional(nnx.Bidirectional):
    """`nnx.Bidirectional`; each of its two layers has the backward of its own.

    Constructor, call and results are those of `flax.nnx.Bidirectional`. Give it two `RNN` of this
    library, or `convert` one of flax.nnx, which converts the layers and the cells that it holds.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> ahead, back = (fcg.RNN(fcg.GRUCell(3, 4, rngs=nnx.Rngs(i))) for i in range(2))
        >>> fcg.Bidirectional(ahead, back)(jnp.ones((2, 5, 3))).shape
        (2, 5, 8)
    """
