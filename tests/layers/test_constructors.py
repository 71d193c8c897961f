"""A layer that stands on one of nnx takes what that takes, in the same order, and hands it on."""

import inspect

import pytest
from flax import nnx

import flax_customgrad as fcg


def of_nnx(cls):
    """The layer of nnx that a class subclasses, where that has a constructor of its own."""
    return next(
        (
            base
            for base in cls.__mro__
            if getattr(nnx, base.__name__, None) is base
            and "self" in inspect.signature(vars(base).get("__init__", print)).parameters
            and not issubclass(nnx.RNNCellBase, base)
        ),
        None,
    )


LAYERS = {
    name: (cls, of_nnx(cls))
    for name, cls in ((name, getattr(fcg, name)) for name in fcg.__all__)
    if inspect.isclass(cls) and of_nnx(cls) and cls.__init__ is not of_nnx(cls).__init__
}


def arguments(cls):
    return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]


def test_there_are_such_layers():
    assert {"LayerNorm", "WeightNorm", "QuantConv", "BitLinear"} <= LAYERS.keys()


@pytest.mark.smoke
@pytest.mark.parametrize("name", LAYERS)
def test_a_constructor_shows_the_arguments_of_nnx_and_then_its_own(name):
    cls, base = LAYERS[name]
    _, *expected = [
        (p.name, p.kind, p.default) for p in inspect.signature(base.__init__).parameters.values()
    ]
    shown = arguments(cls)
    assert shown[: len(expected)] == expected
    for _, kind, _ in shown[len(expected) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY


class Reached(Exception):
    """The constructor of nnx is reached."""


@pytest.mark.smoke
@pytest.mark.parametrize("name", LAYERS)
def test_every_argument_of_nnx_reaches_it(name, monkeypatch):
    cls, base = LAYERS[name]
    signature = inspect.signature(base.__init__)
    _, *parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        pytest.skip("what it hands on has no names")
    # What has no default is a size, in multiples that every check of one lets pass.
    given = {
        p.name: object() if p.default is not p.empty else 64 * i
        for i, p in enumerate(parameters, 1)
    }

    def record(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs).arguments
        assert {key: value for key, value in bound.items() if key != "self"} == given
        raise Reached

    monkeypatch.setattr(base, "__init__", record)
    with pytest.raises(Reached):
        cls(**given)
