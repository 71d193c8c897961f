"""CTC: the probability that frames spell a sequence of labels, with repeats and blanks between.

    forward   of each frame, after it i labels are begun, and it shows the blank or label i:
                  blank[i] = log p(blank) + log(e^blank'[i] + e^label'[i])
                  label[i] = log p(i) + log(e^blank'[i-1] + e^label'[i-1] + e^label'[i])
              where ' is the frame before; loss = -log(e^blank[N] + e^label[N]) of the last frame
    backward  posterior of each state, given the labels: that of the last frame, and from frame to
              frame backwards along the shares of the states ' in the sums above
              dx[k] = g (softmax(x)[k] - the posterior of all states that show class k)
    kept      x, of each frame the maximum and the sum of its softmax, and the states '

Between equal labels there has to be a blank: label'[i-1] then counts with `log_epsilon`, which
stands for log 0 wherever optax has it. Padded frames change no state. The states of a frame are
kept less their largest, and shares add up to 1: both have as many digits at one end of a long
sequence as at the other.

Source: https://www.cs.toronto.edu/~graves/icml_2006.pdf
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.softmax_rows import exponent, minus_max, nonzero
from flax_customgrad.layers.losses.cross_entropy_rows import row_sums
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.inline_jit import inline_jit
from flax_customgrad.numerics.sharding import varying_like

_LOWEST = -1e30
"""Log 0, as a finite number: no path leads here."""


@dataclass(frozen=True)
class CTCConfig:
    """The choices of CTC that are not arrays.

    Attributes:
        blank: the class of the blank.
        log_epsilon: stands for log 0.
    """

    blank: int
    log_epsilon: float


class States(NamedTuple):
    """A number for each state of each sequence, such as its log probability.

    Attributes:
        blank: for i labels that are begun, i from 0 to N; of shape (..., batch, N + 1).
        label: for label i, i from 1 to N; of shape (..., batch, N).
    """

    blank: jax.Array
    label: jax.Array


class Residuals(NamedTuple):
    """What the backward of `ctc` keeps; `before` are the states before each frame."""

    x: jax.Array
    labels: jax.Array
    lengths: jax.Array
    is_frame: jax.Array
    m: jax.Array
    s: jax.Array
    before: States
    last: States
    config: CTCConfig


@custom_vjp
def ctc(
    x: jax.Array,
    labels: jax.Array,
    lengths: jax.Array,
    is_frame: jax.Array,
    config: CTCConfig,
) -> jax.Array:
    """The negative log probability of labels.

    Args:
        x: logits of shape (batch, frames, classes), float.
        labels: numbers of classes of shape (batch, N), -1 for none.
        lengths: how many labels each sequence has, integers of shape (batch,).
        is_frame: which frames are no padding, of shape (batch, frames).
        config: the class of the blank, and the number for log 0.

    Returns:
        Losses of shape (batch,), float32 or wider.
    """
    return _forward(config, x, labels, lengths, is_frame)[0]


def _fwd(
    x: jax.Array,
    labels: jax.Array,
    lengths: jax.Array,
    is_frame: jax.Array,
    config: CTCConfig,
) -> tuple[jax.Array, Residuals]:
    loss, m, s, before, last = _forward(config, x, labels, lengths, is_frame)
    kept = Residuals(x, labels, lengths, is_frame, m, s, before, last, config)
    return loss, kept


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None, None, None]:
    batch, frames, _ = res.x.shape
    chex.assert_shape([g, res.is_frame], [(batch,), (batch, frames)])
    chex.assert_shape(res.before.label, (frames, *res.labels.shape))
    dx = _cotangent(res.config, *res[:-1], g)
    chex.assert_equal_shape([dx, res.x])
    return dx, None, None, None, None


ctc.defvjp(_fwd, _bwd)


@inline_jit(static_argnums=0)
def _forward(
    config: CTCConfig, x: jax.Array, labels: jax.Array, lengths: jax.Array, is_frame: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, States, States]:
    """The losses, and what the backward keeps of them."""
    (x,) = widened(x.dtype, x)
    m, _, s = row_sums(x, None, (-1,), exponent)
    log_p = States(
        _log_p(x[..., config.blank : config.blank + 1], m, s),
        _log_p(jnp.take_along_axis(x, jnp.maximum(labels, 0)[:, None, :], -1), m, s),
    )
    is_class = (labels >= 0)[:, None, :]
    log_p = log_p._replace(label=jnp.where(is_class, log_p.label, config.log_epsilon))
    repeated = _repeated(labels, config, x.dtype)

    def step(carry: tuple[States, jax.Array], frame: Any) -> tuple[Any, States]:
        (before, removed), (log_p, is_frame) = carry, frame
        terms = _terms(before, repeated, config)
        after = States(*(p + _log_sum(of) for p, of in zip(log_p, terms, strict=True)))
        most = jnp.max(after.blank, -1, keepdims=True)
        most = jnp.maximum(most, jnp.max(after.label, -1, keepdims=True, initial=_LOWEST))
        most = jnp.where(is_frame, lax.stop_gradient(most), 0)
        after = _chosen(is_frame, States(*(a - most for a in after)), before)
        return (after, removed + most), before

    none_yet = jnp.zeros_like(labels, x.dtype) + config.log_epsilon
    for array in (x, is_frame):
        none_yet = varying_like(none_yet, array)
    first = States(jnp.pad(none_yet, ((0, 0), (1, 0))), none_yet)
    removed = jnp.zeros_like(first.blank[:, :1])
    frames = (States(*map(_frames_first, log_p)), _frames_first(is_frame[..., None]))
    (last, removed), before = lax.scan(step, (first, removed), frames)
    ends = _log_sum((last.blank, _label_before(last)))
    log_probability = jnp.take_along_axis(ends, lengths[:, None], -1) + removed
    return -log_probability[:, 0], m, s, before, last


@inline_jit(static_argnums=0)
def _cotangent(
    config: CTCConfig,
    x: jax.Array,
    labels: jax.Array,
    lengths: jax.Array,
    is_frame: jax.Array,
    m: jax.Array,
    s: jax.Array,
    before: States,
    last: States,
    g: jax.Array,
) -> jax.Array:
    repeated = _repeated(labels, config, g.dtype)

    def step(posterior: States, frame: tuple[States, jax.Array]) -> tuple[States, States]:
        before, is_frame = frame
        earlier = _shared_out(posterior, before, repeated, config)
        shown = States(*(jnp.where(is_frame, p, 0) for p in posterior))
        return _chosen(is_frame, earlier, posterior), shown

    frames = (before, _frames_first(is_frame[..., None]))
    _, shown = lax.scan(step, _posterior_of_the_last(last, lengths), frames, reverse=True)
    classes = jnp.arange(x.shape[-1])
    blank = jnp.sum(shown.blank, -1).T[..., None] * (classes == config.blank)
    of_class = (labels[..., None] == classes).astype(g.dtype)
    posterior = blank + jnp.einsum("tbn,bnk->btk", shown.label, of_class)
    (x,) = widened(g.dtype, x)
    p = jnp.exp(exponent(x, m)) / nonzero(s)
    dx = g[:, None, None] * (jnp.sum(posterior, -1, keepdims=True) * p - posterior)
    return jnp.where(is_frame[..., None], dx, 0)


def _log_p(x: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
    """The log probabilities of some classes of each frame; finite."""
    return jnp.maximum(minus_max(x, m) - jnp.log(nonzero(s)), _LOWEST)


def _repeated(labels: jax.Array, config: CTCConfig, dtype: Any) -> jax.Array:
    """Log 0 for a label that equals the one before it, else 0; of shape (batch, N)."""
    is_same = labels[:, 1:] == labels[:, :-1]
    is_same = jnp.pad(is_same, ((0, 0), (min(1, labels.shape[1]), 0)))
    return jnp.where(is_same, jnp.asarray(config.log_epsilon, dtype), 0)


def _label_before(states: States) -> jax.Array:
    """Label i of each blank after i labels; there is none after 0."""
    return jnp.pad(states.label, ((0, 0), (1, 0)), constant_values=_LOWEST)


def _terms(
    before: States, repeated: jax.Array, config: CTCConfig
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What is added up, as logarithms: two terms for each blank, and three for each label."""
    label = _label_before(before)
    # optax comes from a label to a blank in two ways, of which one is as good as impossible.
    both = math.log1p(math.exp(config.log_epsilon))
    of_blank = before.blank, label + both
    return of_blank, (before.blank[:, :-1], label[:, :-1] + repeated, before.label)


def _log_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The logarithm of a sum of exponentials of a few finite arrays."""
    most = lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    return most + jnp.log(sum(jnp.exp(a - most) for a in terms))


def _shares(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """The share of each in a sum of exponentials; they add up to 1."""
    most = lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    parts = [jnp.exp(a - most) for a in terms]
    return [part / sum(parts) for part in parts]


def _shared_out(
    posterior: States, before: States, repeated: jax.Array, config: CTCConfig
) -> States:
    """The posterior of the states before a frame, from that of the states after it."""
    of_blank, of_label = _terms(before, repeated, config)
    stay, close = (posterior.blank * share for share in _shares(of_blank))
    begin, go_on, hold = (posterior.label * share for share in _shares(of_label))
    to_the_left = jnp.pad(go_on, ((0, 0), (0, 1)))[:, 1:]
    return States(stay + jnp.pad(begin, ((0, 0), (0, 1))), hold + close[:, 1:] + to_the_left)


def _posterior_of_the_last(last: States, lengths: jax.Array) -> States:
    """All labels are begun in the end: in the last blank, or in the last label."""
    is_end = jnp.arange(last.blank.shape[-1]) == lengths[:, None]
    shares = _shares((last.blank, _label_before(last)))
    blank, label = (jnp.where(is_end, share, 0) for share in shares)
    return States(blank, label[:, 1:])


def _chosen(is_frame: jax.Array, states: States, others: States) -> States:
    pairs = zip(states, others, strict=True)
    return States(*(jnp.where(is_frame, a, b) for a, b in pairs))


def _frames_first(array: jax.Array) -> jax.Array:
    return jnp.moveaxis(array, 1, 0)
