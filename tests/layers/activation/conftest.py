"""The pointwise functions under test, each beside the function of flax.nnx that it replaces."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest
from flax import nnx

import flax_customgrad as fcg

SMOOTH = ["gelu", "silu", "mish", "softplus", "log_sigmoid", "squareplus", "soft_sign", "tanh"]
SMOOTH += ["sigmoid", "elu", "selu", "celu"]
PIECEWISE = ["relu", "relu6", "hard_tanh", "hard_sigmoid", "hard_silu", "leaky_relu"]


class Pair(NamedTuple):
    """A function of this library and that of flax.nnx, or of jax.nn where nnx exports none."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    @classmethod
    def of(cls, name: str) -> "Pair":
        """The pair of that name."""
        return cls(getattr(fcg, name), getattr(nnx, name, getattr(jax.nn, name, None)))


@pytest.fixture(scope="session")
def pointwise() -> dict[str, Pair]:
    """Every pointwise function with its default parameters, by name."""
    pairs = {name: Pair.of(name) for name in SMOOTH + PIECEWISE}
    pairs["gelu, exact"] = Pair(*(functools.partial(f, approximate=False) for f in pairs["gelu"]))
    for residual in ("bits", "output"):
        ours = functools.partial(fcg.relu, residual=residual)
        pairs[f"relu, {residual}"] = Pair(ours, nnx.relu)
    return pairs


@pytest.fixture(scope="session")
def parametrized() -> dict[str, Pair]:
    """Every function of (x, parameter), by name."""
    return {name: Pair.of(name) for name in ("elu", "celu", "leaky_relu", "squareplus")}
