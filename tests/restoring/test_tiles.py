"""Tiles cover an image without gaps or seams; the wavelet transform and the statistics of AdaIN correct colours."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.functional.color import WAVELET_HALO, ChannelStatistics, adain_apply, wavelet_low
from morsr.functional.resample import bicubic_window
from morsr.restoring import Settings, tiles
from morsr.restoring.tiles import finished_rows, tiling


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], int, int]:
    """Size of an image, side of a tile, and the networks' grid."""
    size = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    return size, draw(st.integers(max(size) // 6 + 1, 90)), draw(st.sampled_from([1, 4, 16]))


@given(tilings())
def test_tiling_the_identity_is_the_identity(case):
    size, side, multiple = case
    images, canvas = torch.rand(2, 3, *size), torch.zeros(2, 3, *size)
    plan = tiling(size, side, multiple)
    for window in plan:
        place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
        assert not any(value % multiple for value in place.values())
        assert max(window.height, window.width) <= max(side + multiple - 1, 2 * multiple)
        window.add(canvas, bicubic_window(images, size, **place))
    assert_close(canvas, images, atol=1e-6, rtol=0)


def test_one_tile_hands_over_to_the_next_without_a_step():
    """Two tiles of constants 0 and 1: the ramp between them rises slowly and ends level with its tiles."""
    plan, canvas = tiling((64, 112), 64, 16), torch.zeros(1, 1, 64, 112)
    assert len(plan) == 2
    for value, window in enumerate(plan):
        window.add(canvas, torch.full((1, 1, 64, 64), float(value)))
    ramp = canvas[0, 0, 32]
    assert_close(ramp[[0, 47, 64, 111]], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert (ramp.diff() >= -1e-6).all()
    assert ramp.diff().max() < 0.25
    assert ramp[48] < 0.01 < 0.99 < ramp[63]


# Colours

sides = st.integers(1, 70)


def dilated_convolution(images: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """The transform as published: a 3 x 3 kernel per level, dilated and replicate padded."""
    row = torch.tensor([1.0, 2.0, 1.0])
    kernel = (row[:, None] * row[None, :] / 16).expand(images.shape[1], 1, 3, 3)
    for level in range(levels):
        padded = F.pad(images, (2**level,) * 4, mode="replicate")
        images = F.conv2d(padded, kernel, dilation=2**level, groups=images.shape[1])
    return images


@given(height=sides, width=sides)
def test_low_frequencies_equal_the_dilated_convolution(height, width):
    images = torch.rand(2, 3, height, width)
    assert_close(wavelet_low(images), dilated_convolution(images), atol=1e-6, rtol=0)


def test_low_frequencies_see_no_further_than_the_halo():
    images = torch.zeros(1, 1, 101, 101)
    images[..., 50, 50] = 1
    touched = wavelet_low(images)[0, 0].nonzero() - 50
    assert touched.abs().max() == WAVELET_HALO == 31


def channel_statistics(images: torch.Tensor) -> ChannelStatistics:
    return ChannelStatistics(images.mean((-2, -1), keepdim=True), images.std((-2, -1), keepdim=True, correction=0))


@given(height=st.integers(2, 40), width=st.integers(2, 40), strength=st.floats(0, 1))
def test_adain_moves_mean_and_deviation_of_each_image(height, width, strength):
    images, reference = torch.rand(2, 3, height, width), torch.rand(2, 3, height, width) * 0.5
    content, style = channel_statistics(images), channel_statistics(reference)
    for got, wanted in zip(channel_statistics(adain_apply(images, content, style)), style, strict=True):
        assert_close(got, wanted, atol=1e-4, rtol=0)
    part = adain_apply(images[..., :1, :], content, style, strength=strength)
    assert_close(part, torch.lerp(images, adain_apply(images, content, style), strength)[..., :1, :])


def test_adain_of_a_flat_image_moves_its_mean_only():
    flat, reference = torch.full((1, 3, 8, 8), 0.5), torch.rand(1, 3, 8, 8)
    moved = adain_apply(flat, channel_statistics(flat), style := channel_statistics(reference))
    assert_close(moved, style.mean.expand(1, 3, 8, 8))


@pytest.mark.parametrize("color", ["wavelet", "adain"])
@given(height=st.integers(1, 300), strength=st.floats(0, 1))
def test_rows_have_the_colours_of_the_whole_image(color, height, strength):
    lr, image = torch.rand(1, 3, height, 20), torch.rand(1, 3, height, 20)
    expected = image + strength * wavelet_low(lr - image)
    if color == "adain":
        expected = adain_apply(image, channel_statistics(image), channel_statistics(lr), strength=strength)
    with mock.patch.object(tiles, "ROW_PIXELS", 0):  # 64 rows at once
        rows = list(finished_rows(image, lr, Settings(color=color, color_strength=strength)))
    assert len(rows) == -(-height // 64)
    assert_close(torch.cat(rows, dim=-2), expected.clamp(0, 1), atol=1e-5, rtol=0)
