"""`Frozen`: the Variable of a weight that is not trained, in whatever form it is stored."""

from flax import nnx


class Frozen(nnx.Variable):
    """A part of a frozen weight: codes, scales, or a bias.

    It is no `nnx.Param`: `nnx.grad` and `nnx.Optimizer` leave it alone, and a checkpoint has it.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int4Linear(8, 4, rngs=nnx.Rngs(0))
        >>> sorted(nnx.state(layer, fcg.Frozen))
        ['bias', 'codes', 'scales']
    """
