"""`ctc_loss` of optax by its name, over the operation `ctc`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.losses.ctc import CTCConfig, ctc
from flax_customgrad.layers.losses.labels import class_numbers, static_number
from flax_customgrad.numerics.dtypes import as_array


def ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
) -> jax.Array:
    """The CTC loss, the negative log probability that the frames spell the labels.

    Called as `optax.ctc_loss`, it computes the same. The backward keeps the logits and two numbers
    for each frame and label, and follows the posterior of the labels backwards. Half precision is
    computed in float32, which the losses have too.

    Labels that cannot be spelled, such as more labels than frames, have a loss near a multiple of
    `-log_epsilon`, and a finite gradient, as in optax.

    Args:
        logits: array of shape (batch, frames, classes), real floating numbers.
        logit_paddings: 0 for frames that count and 1 for others, of shape (batch, frames).
        labels: numbers of classes, integers of shape (batch, N).
        label_paddings: 0 for labels that count and 1 behind them, of shape (batch, N).
        blank_id: the class of the blank.
        log_epsilon: stands for log 0.

    Returns:
        Losses of shape (batch,), float32 or wider. A label that is no class is an error; where
        labels are traced, it has the log probability `log_epsilon` and no gradient.

    Raises:
        TypeError: the logits are not real floating numbers, or the labels no integers.
        ValueError: shapes do not fit, a label or the blank is no class, or a label follows padding.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> logits, labels = jnp.zeros((1, 4, 3)), jnp.array([[1, 2]])
        >>> (loss,) = fcg.ctc_loss(logits, jnp.zeros((1, 4)), labels, jnp.zeros((1, 2)))
        >>> f"{loss:.3f}"
        '1.686'

    Source: https://www.cs.toronto.edu/~graves/icml_2006.pdf
    """
    x, labels = jnp.asarray(as_array(logits)), jnp.asarray(as_array(labels))
    is_frame = ~jnp.asarray(as_array(logit_paddings)).astype(bool)
    is_label = ~jnp.asarray(as_array(label_paddings)).astype(bool)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"ctc_loss: logits are {x.dtype}; expected real floating numbers")
    if (
        x.ndim != 3
        or labels.ndim != 2
        or is_frame.shape != x.shape[:2]
        or is_label.shape != labels.shape
        or len(labels) != len(x)
    ):
        raise ValueError(
            f"ctc_loss: logits {x.shape}, logit_paddings {is_frame.shape}, labels "
            f"{labels.shape} and label_paddings {is_label.shape}; expected shapes (batch, frames, "
            "classes), (batch, frames), (batch, N) and (batch, N)"
        )
    if not 0 <= blank_id < x.shape[-1]:
        raise ValueError(f"ctc_loss: blank_id={blank_id!r} is none of the {x.shape[-1]} classes")
    if not is_traced(is_label) and np.any(np.diff(np.asarray(is_label, int), axis=-1) > 0):
        raise ValueError("ctc_loss: a label follows padding; labels have to be padded at the end")
    labels = class_numbers("ctc_loss", labels, x.shape[-1], None, is_label)
    lengths = jnp.sum(is_label, -1, dtype=jnp.int32)
    labels = jnp.where(is_label, labels, -1)
    config = CTCConfig(int(blank_id), static_number("ctc_loss", "log_epsilon", log_epsilon))
    return ctc(x, labels, lengths, is_frame, config)
