"""What an example is compared with: a drop-in with nnx itself, so that a wrong value shows."""

import dataclasses

import pytest

import flax_customgrad as fcg
from flax_customgrad import catalogue
from flax_customgrad.testing import GradientError, check_vjp


class Doubled(fcg.Linear):
    """A drop-in whose gradient is that of its value, which is wrong."""

    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


@pytest.mark.smoke
def test_a_wrong_value_of_a_drop_in_is_caught():
    entry = dataclasses.replace(catalogue.find("Linear"), module=Doubled)
    example = next(iter(entry.examples.values()))(Doubled)
    with pytest.raises(GradientError, match="jit, value, output: off by"):
        check_vjp(*example, **catalogue.expected(entry, example), checks=["jit"])


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("Linear", "reference"), ("gelu", "reference"), ("round_ste", "formula"), ("FSQ", "formula")],
)
def test_each_kind_of_layer_has_its_expectation(name, keyword):
    entry = catalogue.find(name)
    example = next(iter(entry.examples.values()))(entry.module)
    assert set(catalogue.expected(entry, example)) == {keyword}


def test_what_is_neither_drop_in_nor_surrogate_is_differentiated_by_jax():
    entry = catalogue.find("SwiGLU")
    example = next(iter(entry.examples.values()))(entry.module)
    assert catalogue.expected(entry, example) == {}
