"""Tiles: every score that a band shows is in one tile, and no tile is masked throughout."""

import itertools

import numpy as np
import pytest

from flax_customgrad.layers.attention.band import Band
from flax_customgrad.layers.attention.tiles import Tiling, parse_tile_size

BANDS = [Band(), Band(None, 0), Band(3, 0), Band(2, 1), Band(0, None), Band(0, 0)]


def seen_of(band, n_rows, n_keys):
    seen = band.sees(np.arange(n_rows)[:, None], np.arange(n_keys))
    return np.broadcast_to(seen, (n_rows, n_keys))


@pytest.mark.smoke
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_each_score_that_is_seen_is_in_one_tile(band):
    for n_rows, n_keys, size in itertools.product((1, 5, 24), (1, 7, 24), ((4, 4), (3, 10), None)):
        tiling = Tiling.of(n_rows, n_keys, band, size)
        times = np.zeros((tiling.n_rows, tiling.n_keys), int)
        seen = np.zeros_like(times)
        seen[:n_rows, :n_keys] = seen_of(band, n_rows, n_keys)
        for row, key in tiling.starts:
            tile = slice(row, row + tiling.size[0]), slice(key, key + tiling.size[1])
            assert seen[tile].any()
            times[tile] += 1
        assert times.max(initial=0) <= 1
        assert not (seen > times).any()


@pytest.mark.smoke
def test_what_a_band_masks_is_not_computed():
    def tiles(length, band):
        return len(Tiling.of(length, length, band, (8, 8)).starts)

    assert tiles(64, Band()) == 64
    assert tiles(64, Band(None, 0)) == 36
    # The number of tiles of a window grows with the length, and not with its square.
    assert tiles(64, Band(16, 0)) - tiles(32, Band(16, 0)) == 12
    assert tiles(512, Band(16, 0)) - tiles(256, Band(16, 0)) == 96


@pytest.mark.smoke
def test_sizes():
    def size(n_rows, n_keys):
        return Tiling.of(n_rows, n_keys, Band()).size

    assert size(128, 128) == (128, 128)
    assert size(1024, 2048) == (256, 256)
    assert size(1, 4096) == (1, 4096)
    assert size(4096, 16) == (4096, 16)
    assert size(300, 300) == (152, 152)  # and not 256 and 44, filled up to 512
    assert size(0, 3) == (1, 3)
    assert Tiling.of(0, 3, Band()).starts == Tiling.of(3, 0, Band()).starts == ()


@pytest.mark.smoke
def test_forms():
    assert parse_tile_size(None) is None
    assert parse_tile_size(4) == (4, 4)
    assert parse_tile_size([np.int64(4), 8]) == (4, 8)
    assert Band.of(np.int32(3), False) == Band(3, 3)
    assert Band.of([2, None], False) == Band(2, None)
    assert Band.of((2, 5), True) == Band(2, 0)
    assert Band.of(None, False).is_everything
    for size in (0, (4,), (4, -1), "ab", 2.0):
        with pytest.raises(ValueError, match="tile_size="):
            parse_tile_size(size)
    for window in (-1, (1, 2, 3), (1.5, 0), "ab"):
        with pytest.raises(ValueError, match="window="):
            Band.of(window, False)
