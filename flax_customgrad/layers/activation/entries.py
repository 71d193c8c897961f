"""The catalogue's entries of the activation family.

Memory, where it is given, is that of the gradient of eight layers in a `lax.scan`, for 4096x1024
float32 (gate and up 2048x2816): with jax.nn -> with this library.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.layers.activation import (
    exponential,
    gated,
    gated_linear,
    glu,
    log_softmax,
    logsumexp,
    piecewise,
    prelu,
    sigmoidal,
    smooth,
    softmax,
)
from flax_customgrad.numerics.elementwise import elementwise
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, applied, made, normal


def _few() -> jax.Array:
    return 2 * normal(8, 3)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _many_bf16() -> jax.Array:
    return normal(4096, 1024, dtype=jnp.bfloat16)


def _relu(residual: str, inputs: Callable[[], jax.Array]) -> Example:
    """An example with an argument that relu of nnx does not have."""

    def make(relu: Any) -> tuple[Any, ...]:
        if relu is not piecewise.relu:
            return relu, inputs()
        return (lambda x: relu(x, residual=residual)), inputs()

    return make


_WIDE = {"4096x1024": applied(_many)}
_WIDE_AND_BF16 = {**_WIDE, "4096x1024, bf16": applied(_many_bf16)}


def _function_entry(
    function: Callable[..., jax.Array],
    keeps: str,
    gain: str,
    source: str = "",
    *,
    name: str = "",
    examples: Mapping[str, Example] | None = None,
    workloads: Mapping[str, Example] = _WIDE,
    operations: Mapping[Any, str] = MappingProxyType({}),
) -> Entry:
    """The entry of a function of flax.nnx or jax.nn; its default example is the function alone.

    Args:
        function: the function.
        keeps: what its backward keeps.
        gain: what the backward is for.
        source: its paper.
        name: its public name, if that is not `function.__name__`.
        examples: makers of small examples.
        workloads: makers of large ones.
        operations: as in `Entry`.
    """
    name = name or function.__name__
    return Entry(
        name,
        "activation",
        function,
        getattr(nnx, name, getattr(jax.nn, name, None)),
        "exact",
        keeps,
        gain,
        source,
        examples={"alone": applied(_few)} if examples is None else examples,
        workloads=workloads,
        operations=operations,
    )


def _pointwise_entry(function: Callable[..., jax.Array], *facts: str, **keywords: Any) -> Entry:
    """The entry of an elementwise function, with its graph.

    Args:
        function: the function.
        *facts: what its backward keeps, what it is for, and its paper.
        **keywords: as of `_function_entry`.
    """
    entry = _function_entry(function, *facts, **keywords)
    return replace(entry, curves={"": Curve(function, -4.0, 4.0)})


def _learned_parameter(*values: float) -> Example:
    """An example of a function with an array for its parameter, one number per feature."""
    return applied(_few, lambda: jnp.array(values))


def _prelu(inputs: Callable[[], jax.Array], slope: Any = 0.3) -> Example:
    return lambda cls: (cls(slope), inputs())


_SILU = "453 MB -> 168; an infinite x has a value and a gradient"
_HARD_SILU = "336 MB -> 168; 0 at minus infinity, where nnx has NaN"

_POINTWISE = (
    _pointwise_entry(
        smooth.gelu,
        "x",
        "721 MB -> 168, exact 487 -> 168; float16 gradients beyond 148, infinite x",
        "arXiv:1606.08415",
        examples={"tanh": applied(_few), "exact": applied(_few, approximate=False)},
        workloads={**_WIDE_AND_BF16, "4096x1024, exact": applied(_many, approximate=False)},
    ),
    _pointwise_entry(smooth.silu, "x", _SILU, "arXiv:1702.03118", workloads=_WIDE_AND_BF16),
    _pointwise_entry(smooth.swish, "x", _SILU, "arXiv:1702.03118", name="swish"),
    _pointwise_entry(
        smooth.mish,
        "x",
        "604 MB -> 168, from one exponential; right at infinity",
        "arXiv:1908.08681",
        workloads=_WIDE_AND_BF16,
    ),
    _pointwise_entry(smooth.softplus, "x", "185 MB -> 168; derivative in float32"),
    _pointwise_entry(smooth.log_sigmoid, "x", "201 MB -> 168; derivative in float32"),
    _pointwise_entry(
        smooth.squareplus,
        "x, b",
        "319 MB -> 168; accurate for negative x, finite for |x| of 1e30",
        "arXiv:2112.11687",
        examples={"alone": applied(_few), "b for each feature": _learned_parameter(1.0, 4.0, 0.3)},
    ),
    _pointwise_entry(smooth.soft_sign, "x", "470 MB -> 168; 1 at infinity, where nnx has NaN"),
    _pointwise_entry(
        sigmoidal.tanh, "y; x in half precision", "float32 derivative in half precision"
    ),
    _pointwise_entry(
        sigmoidal.sigmoid, "y; x in half precision", "float32 derivative in half precision"
    ),
    _pointwise_entry(
        exponential.elu,
        "x, alpha",
        "268 MB -> 168; float32 sum for alpha",
        "arXiv:1511.07289",
        examples={
            "alone": applied(_few),
            "alpha for each feature": _learned_parameter(1.0, 0.5, 2.0),
        },
    ),
    _pointwise_entry(exponential.selu, "x", "268 MB -> 168", "arXiv:1706.02515"),
    _pointwise_entry(
        exponential.celu,
        "x, alpha",
        "503 MB -> 168; float32 sum for alpha",
        "arXiv:1704.07483",
        examples={
            "alone": applied(_few),
            "x and alpha both repeated": applied(
                lambda: 2 * normal(8, 1, 3), lambda: jnp.array([[0.5], [2.0]])
            ),
        },
        operations={elementwise: "x and alpha both repeated"},
    ),
    _pointwise_entry(
        piecewise.relu,
        "a mask, or as its `residual` says bits or y",
        "67 MB -> 38 with bits",
        examples={
            "mask": applied(_few),
            "bits": _relu("bits", lambda: 2 * normal(8, 11)),
            "output": _relu("output", _few),
        },
        workloads={**_WIDE_AND_BF16, "4096x1024, bits": _relu("bits", _many)},
    ),
    _pointwise_entry(piecewise.relu6, "a mask", "the same as nnx's"),
    _pointwise_entry(piecewise.hard_tanh, "a mask", "134 MB -> 67"),
    _pointwise_entry(
        piecewise.hard_sigmoid, "a mask", "the same as nnx's; half precision rounded once"
    ),
    _pointwise_entry(piecewise.hard_silu, "x", _HARD_SILU),
    _pointwise_entry(piecewise.hard_swish, "x", _HARD_SILU, name="hard_swish"),
    _pointwise_entry(
        piecewise.leaky_relu,
        "a mask; x and the slope where the slope is an array",
        "float32 sum for the slope",
        examples={
            "alone": applied(_few),
            "slope for each feature": _learned_parameter(0.1, 0.5, -0.2),
        },
    ),
    Entry(
        "PReLU",
        "activation",
        prelu.PReLU,
        nnx.PReLU,
        "exact",
        keeps="x, negative_slope",
        gain="float32 sum for the slope; 201 MB -> 168",
        source="arXiv:1502.01852",
        examples={
            "one slope": _prelu(_few),
            "two slopes, x of three axes, one of size 1": _prelu(
                lambda: normal(8, 2, 1), np.array([[-0.3], [1.5]])
            ),
        },
        curves={"slope 0.25": Curve(lambda x: prelu.PReLU(0.25)(x), -4.0, 4.0)},
        workloads={"4096x1024": _prelu(_many), "4096x1024, bf16": _prelu(_many_bf16)},
        operations={prelu.prelu: "two slopes, x of three axes, one of size 1"},
    ),
)


def _mask() -> jax.Array:
    return jnp.arange(24).reshape(8, 3) % 5 > 0


def _blocks() -> jax.Array:
    """Rows of two axes, of which some hold their maximum more than once."""
    return jnp.round(2 * normal(8, 1, 2, 3)) / 2


def _mask_of_blocks() -> jax.Array:
    return jnp.arange(16).reshape(8, 1, 2, 1) % 4 < 3


_ROW_WORKLOADS = {**_WIDE_AND_BF16, "1024x4096": applied(lambda: normal(1024, 4096))}

_SOFTMAX = (
    _function_entry(
        softmax.softmax,
        "y",
        "an empty or infinite row has its limit, where jax.nn has NaN",
        examples={
            "last axis": applied(_few),
            "where": applied(_few, -1, _mask),
            "two axes, ties, where": applied(_blocks, (-1, 2), _mask_of_blocks),
        },
        workloads=_ROW_WORKLOADS,
        operations={softmax.softmax_of_rows: "two axes, ties, where"},
    ),
    _function_entry(
        log_softmax.log_softmax,
        "y",
        "an empty or infinite row has its limit, where jax.nn has NaN",
        examples={
            "last axis": applied(_few),
            "two axes, ties": applied(_blocks, (-1, 2)),
        },
        workloads=_ROW_WORKLOADS,
        operations={log_softmax.log_softmax_of_rows: "two axes, ties"},
    ),
    _function_entry(
        logsumexp.logsumexp,
        "x; the maximum and the sum of each row",
        "no exponentials kept; gradients of empty and infinite rows",
        examples={
            "last axis": applied(_few, -1),
            "where": applied(_few, -1, None, True, False, _mask),
            "two axes, ties, where": applied(_blocks, (-1, 2), None, False, False, _mask_of_blocks),
        },
        operations={logsumexp.logsumexp_of_rows: "two axes, ties, where"},
        workloads={"4096x1024": applied(_many, -1)},
    ),
)


def _gate_and_up(*shape: int, dtype: Any = jnp.float32) -> Example:
    return applied(
        lambda: normal(*shape, dtype=dtype), lambda: normal(*shape, dtype=dtype)[..., ::-1]
    )


def _product_entry(
    function: Callable[..., jax.Array],
    gain: str,
    operations: Mapping[Any, str] = MappingProxyType({}),
) -> Entry:
    return Entry(
        function.__name__,
        "activation",
        function,
        None,
        "exact",
        keeps="gate, up",
        gain=gain,
        source="arXiv:2002.05202",
        examples={"three axes, one of size 1": _gate_and_up(8, 1, 3)},
        workloads={
            "2048x2816": _gate_and_up(2048, 2816),
            "2048x2816, bf16": _gate_and_up(2048, 2816, dtype=jnp.bfloat16),
        },
        operations=operations,
    )


def _gated_linear_entry(cls: type[nnx.Module], gain: str) -> Entry:
    return Entry(
        cls.__name__,
        "activation",
        cls,
        None,
        "exact",
        keeps="x, both projections and their kernels",
        gain=f"{gain}; composed of `Linear` and the product",
        source="arXiv:2002.05202",
        examples={
            "alone": made(6, 4, inputs=(lambda: normal(8, 6),)),
            "bias": made(6, 4, use_bias=True, **RANDOM_BIAS, inputs=(lambda: normal(8, 6),)),
        },
        workloads={"2048x1024 to 2816": made(1024, 2816, inputs=(lambda: normal(2048, 1024),))},
    )


_SWIGLU, _GEGLU, _REGLU = "807 MB -> 231", "1177 MB -> 231", "277 MB -> 231"

_GATED = (
    _function_entry(
        glu.glu,
        "x",
        "243 MB -> 176",
        "arXiv:1612.08083",
        examples={
            "last axis": applied(lambda: normal(8, 6)),
            "middle axis, beside one of size 1": applied(lambda: normal(8, 4, 1), -2),
        },
        operations={glu.gated_halves: "middle axis, beside one of size 1"},
    ),
    _product_entry(gated.swiglu, _SWIGLU, {elementwise: "three axes, one of size 1"}),
    _product_entry(gated.geglu, _GEGLU),
    _product_entry(gated.reglu, _REGLU),
    _gated_linear_entry(gated_linear.SwiGLU, _SWIGLU),
    _gated_linear_entry(gated_linear.GeGLU, _GEGLU),
    _gated_linear_entry(gated_linear.ReGLU, _REGLU),
)

ENTRIES = (*_POINTWISE, *_SOFTMAX, *_GATED)
