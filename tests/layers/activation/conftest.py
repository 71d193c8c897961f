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

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    @classmethod
    def of(cls, name: str) -> "Pair":
        """The pair of that name."""
        return cls(name, getattr(fcg, name), getattr(nnx, name, getattr(jax.nn, name, None)))

    def called_with(self, name: str, **kwargs: Any) -> "Pair":
        """The pair with some arguments fixed."""
        return Pair(name, *(functools.partial(f, **kwargs) for f in (self.ours, self.theirs)))


def _pairs() -> list[Pair]:
    pairs = [Pair.of(name) for name in SMOOTH + PIECEWISE]
    pairs.append(Pair.of("gelu").called_with("gelu, exact", approximate=False))
    for policy in ("bits", "output"):
        ours = functools.partial(fcg.relu, residual=policy)
        pairs.append(Pair(f"relu, {policy}", ours, nnx.relu))
    return pairs


@pytest.fixture(params=_pairs(), ids=lambda pair: pair.name)
def pointwise(request: pytest.FixtureRequest) -> Pair:
    """Each pointwise function with its default parameters."""
    return request.param


@pytest.fixture(params=["elu", "celu", "leaky_relu", "squareplus"])
def parametrized(request: pytest.FixtureRequest) -> Pair:
    """Each function of (x, parameter)."""
    return Pair.of(request.param)
