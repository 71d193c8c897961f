"""The sums of a depthwise kernel's gradient, each way of taking them against XLA's."""

import jax
import numpy as np
import pytest

from flax_customgrad.layers.conv.geometry import Geometry
from flax_customgrad.layers.conv.lowerings import depthwise
from flax_customgrad.layers.conv.lowerings.depthwise_sums import (
    sum_all_at_once,
    sum_by_blocks,
    sum_by_rows,
)

FEATURES = 4
GEOMETRIES = {
    "2-D": ((7, 9), (3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1)),
    "2-D strided, dilated": ((11, 8), (3, 3), (2, 1), ((2, 1), (-1, 2)), (1, 2)),
    "2-D, dilated the other way": ((13, 8), (4, 3), (2, 2), ((1, 2), (1, 0)), (3, 1)),
    "2-D, many elements": ((9, 8), (7, 5), (1, 1), ((3, 3), (2, 2)), (1, 1)),
    "1-D": ((21,), (5,), (2,), ((2, 2),), (1,)),
}


def _kernel_gradient(x, g, geometry):
    def correlate(w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            geometry.strides,
            geometry.padding,
            rhs_dilation=geometry.kernel_dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC")
            if geometry.rank == 2
            else ("NWC", "WIO", "NWC"),
            feature_group_count=FEATURES,
        )

    (dw,) = jax.linear_transpose(correlate, np.zeros((*geometry.window, 1, FEATURES), x.dtype))(g)
    return dw.reshape(-1, FEATURES)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("batch", [2, 400], ids=["few images", "a loop over images"])
def test_every_way_gives_the_sums_of_xla(name, batch):
    size, window, strides, padding, dilation = GEOMETRIES[name]
    ones = (1,) * len(size)
    geometry = Geometry(
        size, window, FEATURES, FEATURES, strides, padding, ones, dilation, FEATURES
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *size, FEATURES)).astype(np.float32)
    g = rng.normal(size=(batch, *geometry.out, FEATURES)).astype(np.float32)
    ways = {"all at once": sum_all_at_once, "blocks": sum_by_blocks, "rows": sum_by_rows}
    expected = _kernel_gradient(x, g, geometry)
    for way, sums in ways.items():
        found = jax.jit(sums, static_argnums=2)(x, g, geometry)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3, err_msg=way)


@pytest.mark.parametrize(
    ("images", "window", "expected"),
    [
        (2, (3, 3), sum_all_at_once),
        (2, (7, 7), sum_by_rows),
        (2, (49, 1), sum_all_at_once),
        (64, (3, 3), sum_all_at_once),
        (128, (3, 3), sum_by_blocks),
        (64, (7, 7), sum_all_at_once),
        (512, (7, 7), sum_all_at_once),
    ],
    ids=[
        "small",
        "small, large window",
        "small, a column",
        "medium",
        "large",
        "medium, large window",
        "large, large window",
    ],
)
def test_the_way_depends_on_what_there_is_to_sum(images, window, expected):
    geometry = Geometry((16, 16), window, 8, 8, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 8)
    g = jax.ShapeDtypeStruct((images, 16, 16, 8), np.float32)
    assert depthwise._sums(g, geometry) is expected
