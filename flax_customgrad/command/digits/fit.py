"""Training in one program: a loop over steps that JAX may compile, and vmap over seeds."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flax_customgrad.command.digits.data import Batch

_BATCH, _RATE = 64, 3e-3

AnyNetwork = TypeVar("AnyNetwork", bound=nnx.Module)


def fit(
    network: AnyNetwork,
    loss: Callable[[AnyNetwork, Batch], jax.Array],
    train: Batch,
    steps: int,
    key: jax.Array,
) -> AnyNetwork:
    """Trains a network with Adam; the learning rate falls from 3e-3 to 0 by a cosine.

    Args:
        network: the network; it may write its state when it is called.
        loss: the loss of a network and a batch, a number.
        train: what to draw batches of 64 from.
        steps: how many.
        key: a key of `jax.random`.

    Returns:
        A trained copy.
    """
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

    def loss_of_params(params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, Any]:
        network = nnx.merge(graph, params, rest, copy=True)
        return loss(network, batch), nnx.state(network, nnx.Not(nnx.Param))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, rest, state = carry
        chosen = jax.random.randint(key, (_BATCH,), 0, len(train.labels))
        batch = jax.tree.map(lambda a: jnp.asarray(a)[chosen], train)
        gradient, rest = jax.grad(loss_of_params, has_aux=True)(params, rest, batch)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), rest, state), None

    initial = (params, rest, optimizer.init(params))  # type: ignore[arg-type]
    (params, rest, _), _ = jax.lax.scan(step, initial, jax.random.split(key, steps))
    return nnx.merge(graph, params, rest)
