"""Tiles and windows: every pixel is covered, the identity stays the identity, and windows of enlargements fit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.errors import ConfigError, InputError
from morsr.functional.resample import bicubic_window, edge_index
from morsr.functional.tiling import apply_tiled, blend_bands, blend_tiles, feather_weights, tile_starts, tile_windows


@st.composite
def tilings(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    multiple = draw(st.sampled_from([1, 4, 16]))
    tile = draw(st.integers(2, 6)) * multiple
    overlap = draw(st.integers(0, tile // multiple - 1)) * multiple
    height, width = (draw(st.integers(1, 24)) * multiple for _ in range(2))
    return height, width, tile, overlap, multiple


@given(tilings())
def test_starts_cover_the_length_on_the_grid(case: tuple[int, int, int, int, int]):
    length, _, tile, overlap, multiple = case
    starts = tile_starts(length, tile, overlap=overlap, multiple=multiple)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - tile)
    assert all(start % multiple == 0 for start in starts)
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    if length > tile:
        assert (len(starts) - 1) * (tile - overlap) + overlap < length, "one tile fewer would do"


@given(tilings())
def test_tiling_the_identity_is_the_identity(case: tuple[int, int, int, int, int]):
    height, width, tile, overlap, multiple = case
    images = torch.rand(2, 3, height, width)
    tiled = apply_tiled(lambda part: part, images, tile, overlap=overlap, multiple=multiple)
    assert_close(tiled, images, atol=1e-6, rtol=0)


@given(tilings())
def test_bands_are_the_rows_of_the_whole(case: tuple[int, int, int, int, int]):
    height, width, tile, overlap, multiple = case
    windows = tile_windows(height, width, tile, overlap=overlap, multiple=multiple)
    tiles = [(window, torch.rand(1, 3, window.height, window.width)) for window in windows]
    total, weight = torch.zeros(1, 3, height, width), torch.zeros(height, width)
    for window, values in tiles:
        feather = feather_weights(window.height, window.width)
        total[..., window.rows, window.columns] += values * feather
        weight[window.rows, window.columns] += feather
    bands = list(blend_bands(tiles, height, width))
    assert max(band.shape[-2] for band in bands) <= tile
    assert_close(torch.cat(bands, dim=-2), total / weight, atol=1e-6, rtol=1e-5)


def test_the_feather_hands_over_without_a_step():
    """Two tiles of constants 0 and 1: the ramp between them rises slowly and ends level with its tiles."""
    windows = tile_windows(64, 112, 64, overlap=16)
    tiles = [(window, torch.full((1, 1, 64, 64), float(index))) for index, window in enumerate(windows)]
    ramp = blend_tiles(tiles, 64, 112)[0, 0, 32]
    assert len(windows) == 2
    assert ramp[:48].max() == 0
    assert ramp[64:].min() == 1
    assert (ramp.diff() >= 0).all()
    assert ramp.diff().max() < 0.25
    assert ramp[48] < 0.01 < 0.99 < ramp[63]


def test_weights_never_vanish():
    weights = feather_weights(1024, 16)
    assert weights.min() > 1e-20
    assert_close(weights, weights.flip(0, 1))


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "multiple"),
    [(0, 8, 0, 1), (64, 0, 0, 1), (64, 16, 16, 1), (64, 24, 8, 16), (60, 16, 0, 16)],
)
def test_impossible_tilings_are_refused(length: int, tile: int, overlap: int, multiple: int):
    with pytest.raises(ConfigError, match="expected"):
        tile_starts(length, tile, overlap=overlap, multiple=multiple)


def test_tiles_that_do_not_fit_are_refused():
    windows = tile_windows(32, 32, 16, overlap=0)
    tiles = [(window, torch.rand(1, 3, 16, 16)) for window in windows]
    with pytest.raises(InputError, match="do not cover"):
        blend_tiles(tiles[:2], 32, 32)
    with pytest.raises(InputError, match="uncovered"):
        blend_tiles([tiles[0], *tiles[2:]], 32, 32)
    with pytest.raises(InputError, match="came for the window"):
        blend_tiles([(windows[0], torch.rand(1, 3, 16, 8))], 32, 32)


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    scale=st.sampled_from([1.0, 1.3, 1.5, 2.0, 3.7, 4.0, 8.0]),
    data=st.data(),
)
def test_windows_are_cut_from_the_interpolated_image(height: int, width: int, scale: float, data: st.DataObject):
    images = torch.rand(1, 3, height, width)
    size = (round(height * scale), round(width * scale))
    whole = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    top, left = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    bottom, right = data.draw(st.integers(top + 1, size[0])), data.draw(st.integers(left + 1, size[1]))
    window = bicubic_window(images, size, top=top, left=left, height=bottom - top, width=right - left)
    assert_close(window, whole[..., top:bottom, left:right], atol=1e-5, rtol=0)


def test_what_lies_beyond_the_image_repeats_its_edge():
    images = torch.rand(1, 3, 5, 9)
    padded = bicubic_window(images, (5, 9), height=8, width=16)
    assert_close(padded, F.pad(images, (0, 7, 0, 3), mode="replicate"))
    assert_close(bicubic_window(images[..., :1, :1], (1, 1), height=3, width=4), images[..., :1, :1].expand(1, 3, 3, 4))
    assert edge_index(torch.arange(6), 3).tolist() == [0, 1, 2, 2, 2, 2]


def test_enlargement_does_not_shrink():
    with pytest.raises(ConfigError, match="at least 4"):
        bicubic_window(torch.rand(1, 3, 4, 4), (3, 4), height=3, width=4)


@given(tilings(), st.integers(1, 40))
def test_bands_are_no_higher_than_asked(case: tuple[int, int, int, int, int], rows: int):
    height, width, tile, overlap, multiple = case
    images = torch.rand(1, 3, height, width)
    windows = tile_windows(height, width, tile, overlap=overlap, multiple=multiple)
    bands = list(blend_bands(((window, window.cut(images)) for window in windows), height, width, rows=rows))
    assert max(band.shape[-2] for band in bands) <= rows
    assert_close(torch.cat(bands, dim=-2), images, atol=1e-6, rtol=0)
