"""Colour correction: the wavelet and the AdaIN transform keep what they promise, ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.errors import ConfigError, InputError
from morsr.functional.color import (
    adain_color,
    channel_statistics,
    match_color,
    wavelet_color,
    wavelet_halo,
    wavelet_low,
)


def dilated_convolution(images: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """The transform as published: a 3 x 3 kernel per level, dilated and replicate padded."""
    row = torch.tensor([1.0, 2.0, 1.0])
    kernel = (row[:, None] * row[None, :] / 16).expand(images.shape[1], 1, 3, 3)
    for level in range(levels):
        padded = F.pad(images, (2**level,) * 4, mode="replicate")
        images = F.conv2d(padded, kernel, dilation=2**level, groups=images.shape[1])
    return images


sides = st.integers(1, 70)


@given(height=sides, width=sides)
def test_low_frequencies_equal_the_dilated_convolution(height: int, width: int):
    images = torch.rand(2, 3, height, width)
    assert_close(wavelet_low(images), dilated_convolution(images), atol=1e-6, rtol=0)


@given(height=sides, width=sides)
def test_wavelet_gives_the_low_frequencies_of_the_reference(height: int, width: int):
    images, reference = torch.rand(1, 3, height, width), torch.rand(1, 3, height, width)
    expected = images - dilated_convolution(images) + dilated_convolution(reference)
    assert_close(wavelet_color(images, reference), expected, atol=2e-6, rtol=0)
    assert_close(
        wavelet_color(images, reference, strength=0.25), images + 0.25 * (expected - images), atol=2e-6, rtol=0
    )


def test_a_constant_cast_is_removed_and_detail_stays():
    reference = torch.rand(1, 3, 64, 64)
    cast = reference + torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1)
    for method in ("wavelet", "adain"):
        assert_close(match_color(cast, reference, method=method), reference, atol=1e-5, rtol=0)
    assert match_color(cast, reference, method="none") is cast


def test_low_frequencies_see_no_further_than_the_halo():
    images = torch.zeros(1, 1, 101, 101)
    images[..., 50, 50] = 1
    touched = wavelet_low(images)[0, 0].nonzero() - 50
    assert touched.abs().max() == wavelet_halo() == 31


@given(height=st.integers(2, 40), width=st.integers(2, 40), strength=st.floats(0, 1))
def test_adain_moves_mean_and_deviation(height: int, width: int, strength: float):
    images, reference = torch.rand(2, 3, height, width), torch.rand(2, 3, height, width) * 0.5
    moved = adain_color(images, reference, strength=1.0)
    for got, wanted in zip(channel_statistics(moved), channel_statistics(reference), strict=True):
        assert_close(got, wanted, atol=1e-4, rtol=0)
    assert_close(adain_color(images, reference, strength=strength), torch.lerp(images, moved, strength))


def test_adain_of_a_flat_image_moves_its_mean_only():
    flat, reference = torch.full((1, 3, 8, 8), 0.5), torch.rand(1, 3, 8, 8)
    expected = reference.mean(dim=(-2, -1), keepdim=True).expand(1, 3, 8, 8)
    assert_close(adain_color(flat, reference), expected)


@pytest.mark.parametrize(("method", "strength"), [("histogram", 1.0), ("wavelet", 1.5), ("adain", float("nan"))])
def test_settings_out_of_range_are_refused(method: str, strength: float):
    images = torch.rand(1, 3, 4, 4)
    with pytest.raises(ConfigError, match="expected"):
        match_color(images, images, method=method, strength=strength)


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match="one shape"):
        match_color(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5))
