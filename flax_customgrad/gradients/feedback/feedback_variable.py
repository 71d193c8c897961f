"""`Feedback`: the Variable of what is fixed and random in a backward."""

from flax import nnx


class Feedback(nnx.Variable):
    """A fixed random matrix through which errors are sent back.

    It is no `nnx.Param`: `nnx.grad` and `nnx.Optimizer` leave it alone, and a checkpoint has it.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackLinear(3, 4, rngs=nnx.Rngs(0))
        >>> list(nnx.state(layer, fcg.Feedback))
        ['feedback']
    """
