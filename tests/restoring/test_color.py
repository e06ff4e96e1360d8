"""Colour correction: the wavelet transform and the statistics of AdaIN."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.functional.color import ChannelStatistics, adain_apply, wavelet_halo, wavelet_low

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
    assert touched.abs().max() == wavelet_halo() == 31


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
