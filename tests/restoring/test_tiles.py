"""Tiles cover an image without gaps or seams, and finished rows have the colours of the input."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.functional.color import ChannelStatistics, adain_apply, wavelet_low
from morsr.functional.resample import bicubic_window, edge_index
from morsr.restoring import Settings
from morsr.restoring.tiles import finished_rows, tile_starts, tiling


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], int, int]:
    """Size of an image, side of a tile, and the networks' grid."""
    size = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    return size, draw(st.integers(max(size) // 6 + 1, 90)), draw(st.sampled_from([1, 4, 16]))


@given(tilings())
def test_tiling_the_identity_is_the_identity(case: tuple[tuple[int, int], int, int]):
    size, side, multiple = case
    images, canvas = torch.rand(2, 3, *size), torch.zeros(2, 3, *size)
    plan = tiling(size, side, multiple)
    for window in plan.windows:
        place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
        assert not any(value % multiple for value in place.values())
        assert max(window.height, window.width) <= plan.side <= max(side + multiple - 1, 2 * multiple)
        window.add(canvas, bicubic_window(images, size, **place))
    assert_close(canvas, images, atol=1e-6, rtol=0)


@given(cells=st.integers(1, 60), tile=st.integers(2, 20), multiple=st.sampled_from([1, 16]), data=st.data())
def test_starts_are_few_even_and_on_the_grid(cells: int, tile: int, multiple: int, data: st.DataObject):
    overlap = data.draw(st.integers(1, tile - 1))
    length, tile, overlap = (value * multiple for value in (cells, tile, overlap))
    starts = tile_starts(length, tile, overlap=overlap, multiple=multiple)
    assert (starts[0], starts[-1]) == (0, max(0, length - tile))
    assert all(start % multiple == 0 for start in starts)
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    assert length <= tile or (len(starts) - 1) * (tile - overlap) + overlap < length, "one tile fewer would do"


def test_one_tile_hands_over_to_the_next_without_a_step():
    """Two tiles of constants 0 and 1: the ramp between them rises slowly and ends level with its tiles."""
    plan, canvas = tiling((64, 112), 64, 16), torch.zeros(1, 1, 64, 112)
    assert len(plan.windows) == 2
    for value, window in enumerate(plan.windows):
        window.add(canvas, torch.full((1, 1, 64, 64), float(value)))
    ramp = canvas[0, 0, 32]
    assert_close(ramp[[0, 47, 64, 111]], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert (ramp.diff() >= -1e-6).all()
    assert ramp.diff().max() < 0.25
    assert ramp[48] < 0.01 < 0.99 < ramp[63]


def channel_statistics(images: torch.Tensor) -> ChannelStatistics:
    return ChannelStatistics(images.mean((-2, -1), keepdim=True), images.std((-2, -1), keepdim=True, correction=0))


def corrected(image: torch.Tensor, lr: torch.Tensor, color: str, strength: float) -> torch.Tensor:
    """An image with the colours of another one of its size, at once."""
    if color == "wavelet":
        return image + strength * wavelet_low(lr - image)
    if color == "adain":
        return adain_apply(image, channel_statistics(image), channel_statistics(lr), strength=strength)
    return image


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 20),
    color=st.sampled_from(["wavelet", "adain", "none"]),
    strength=st.floats(0, 1),
)
def test_rows_have_the_colours_of_the_whole_image(height: int, width: int, color: str, strength: float):
    lr, image = torch.rand(1, 3, height, width), torch.rand(1, 3, height, width)
    chosen = Settings(color=color, color_strength=1.0 if color == "none" else strength)
    expected = corrected(image, lr, color, chosen.color_strength).clamp(0, 1)
    assert_close(torch.cat(list(finished_rows(image, lr, chosen)), dim=-2), expected, atol=1e-5, rtol=0)


# The bicubic enlargement of one window


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
    padded: Tensor = bicubic_window(images, (5, 9), height=8, width=16)
    assert_close(padded, F.pad(images, (0, 7, 0, 3), mode="replicate"))
    assert edge_index(torch.arange(6), 3).tolist() == [0, 1, 2, 2, 2, 2]
