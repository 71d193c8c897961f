"""Surrogates and membranes as snntorch and spyx compute them.

Not taken: snntorch's `triangular`, a constant whose sign changes at the threshold; its `sigmoid`,
exponentials that overflow to NaN, where ours is s(ku)(1 - s(ku)); its `spike_rate_escape`, centred
at 1 instead of the threshold; the `arctan` of spyx, 1 / (pi (1 + (pi k u)^2)), another one than the
paper's; its `boxcar`, whose bounds are open, against its docstring.

snntorch resets one step after the spike unless told `reset_delay=False`, and then differentiates
the reset, which it detaches with the delay. With the delay, Leaky's reset to zero comes to the same
spikes; its subtraction is not scaled by the decay, and Synaptic's reset to zero drops the input of
that step: these two are not taken.
"""

from typing import Any

VERSIONS = {"snntorch": "1.0.0", "spyx": "1.0.0"}

U = [-1000.0, -0.4, -0.1, 0.0, 0.02, 0.4, 1000.0]
INPUT = [0.3, 0.8, 0.6, -0.4, 0.9, 0.7, 0.95]
DECAY, CURRENT_DECAY = 0.8, 0.5


def values() -> dict[str, Any]:
    """Inputs and what comes of them, by name."""
    return {
        "surrogates": {"u": U, **_snntorch_surrogates(), **_spyx_surrogates()},
        "input": INPUT,
        "decay": DECAY,
        "current_decay": CURRENT_DECAY,
        "cells": _cells(),
    }


def _snntorch_surrogates() -> dict[str, Any]:
    import torch
    from snntorch import surrogate

    def gradient(function: Any) -> list[float]:
        u = torch.tensor(U, dtype=torch.float64, requires_grad=True)
        (du,) = torch.autograd.grad(function(u).sum(), u)
        return du.tolist()

    return {
        "fast_sigmoid": gradient(surrogate.fast_sigmoid(5)),
        "atan": gradient(surrogate.atan(3.0)),
    }


def _spyx_surrogates() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from spyx import axn

    triangular = axn.triangular(2)
    u = jnp.array(U, jnp.float32)
    return {"triangular": jax.grad(lambda u: triangular(u).sum())(u).tolist()}


def _cells() -> dict[str, Any]:
    """Spikes, membranes after each step, and the gradient of a weighted sum of the spikes."""
    import snntorch
    import torch
    from snntorch import surrogate

    def trajectory(cell: Any, states: int) -> dict[str, Any]:
        x = torch.tensor(INPUT, requires_grad=True)
        state = (torch.zeros(1),) * states
        spikes, membranes = [], []
        for input_ in x:
            spike, *state = cell(input_[None], *state)
            spikes.append(spike)
            membranes.append(state[-1])
        weighted = torch.cat(spikes) @ torch.arange(1.0, len(x) + 1)
        (gradient,) = torch.autograd.grad(weighted, x)
        return {
            "spikes": torch.cat(spikes).tolist(),
            "membrane": torch.cat(membranes).tolist(),
            "gradient": gradient.tolist(),
        }

    def leaky(reset: str, delay: bool) -> dict[str, Any]:
        spike = surrogate.atan(2.0)
        return trajectory(
            snntorch.Leaky(DECAY, spike_grad=spike, reset_mechanism=reset, reset_delay=delay), 1
        )

    def synaptic(reset: str) -> dict[str, Any]:
        decays = CURRENT_DECAY, DECAY
        spike = surrogate.atan(2.0)
        return trajectory(
            snntorch.Synaptic(*decays, spike_grad=spike, reset_mechanism=reset, reset_delay=False),
            2,
        )

    return {
        "Leaky": {reset: leaky(reset, False) for reset in ("subtract", "zero")},
        "LIF": {reset: synaptic(reset) for reset in ("subtract", "zero")},
        "gradient of Leaky, detached reset to zero": leaky("zero", True)["gradient"],
    }
