"""The statistics that the estimators read, each against what it claims to measure."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import compressed, noisy, scene

from morsr.estimators.frequency import piecewise_linear
from morsr.estimators.statistics import (
    FREQUENCIES,
    LAGS,
    QUALITIES,
    band_energies,
    block_dct,
    block_statistics,
    blur_statistics,
    image_traces,
    luma_chroma,
    noise_shape,
    noise_statistics,
    periodicity,
    table_agreement,
)
from morsr.functional.corrupt import jpeg, resize


def test_monotone_curve():
    knots = torch.tensor([[0.0, 1.0, 3.0]])
    values = torch.tensor([[-1.0], [0.5], [1.0], [2.0], [9.0]])
    expected = torch.tensor([[0.0], [0.25], [0.5], [0.75], [1.0]])
    torch.testing.assert_close(piecewise_linear(values, knots), expected)


def test_band_energies_find_a_wave_in_its_band():
    place = torch.arange(64.0)
    for cycles, band in ((0.03, 0), (0.1, 1), (0.2, 2), (0.4, 3)):
        wave = (128 + 50 * torch.cos(2 * math.pi * cycles * place))[None, None, :].expand(1, 48, 64)
        shares = band_energies(wave)
        assert shares[0].argmax() == band
        assert shares[0, band] > 0.9
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


def test_noise_level_is_that_of_the_noise_in_gray_and_in_colour():
    flat = torch.full((1, 3, 96, 96), 0.5)
    generator = torch.Generator().manual_seed(0)
    for sigma in (2.0, 10.0, 25.0):
        gray = torch.randn((1, 1, 96, 96), generator=generator) * sigma / 255
        colour = torch.randn((1, 3, 96, 96), generator=generator) * sigma / 255
        for field in (gray, colour):
            level = noise_statistics((flat + field).clamp(0, 1))["noise"].exp()
            assert 0.7 * sigma < level < 1.1 * sigma


def test_dct_is_orthonormal_and_counts_whole_blocks():
    image = torch.rand(2, 21, 35)
    blocks = block_dct(image)
    assert blocks.shape == (2, 2 * 4, 8, 8)
    torch.testing.assert_close(blocks.square().sum(), image[:, :16, :32].square().sum())
    constant = block_dct(torch.full((1, 8, 8), 3.0))[0, 0]
    torch.testing.assert_close(constant[0, 0], torch.tensor(24.0))


@pytest.mark.parametrize("quality", [35, 50, 71, 86])
def test_the_quantisation_table_is_recognised(quality):
    luma, chroma = luma_chroma(compressed(noisy(scene(), 6), quality))
    found = 100 - float(block_statistics(luma, chroma)["table"])
    assert abs(found - quality) <= 2 * (QUALITIES[1] - QUALITIES[0])
    shifted = block_statistics(luma[..., 3:, 3:], chroma[..., 3:, 3:])
    assert float(shifted["table"]) == 0


def test_blocks_show_on_the_grid_only():
    luma, chroma = luma_chroma(compressed(noisy(scene(), 6), 30))
    clean, none = luma_chroma(noisy(scene(), 6))
    here = block_statistics(luma, chroma)["block"]
    assert here > block_statistics(clean, none)["block"] + 0.1
    assert here > block_statistics(luma[..., 4:, 4:], chroma[..., 4:, 4:])["block"] + 0.1


@pytest.mark.parametrize("height", [10.0, 100.0])
def test_edge_ratio_follows_width_and_not_height(height):
    place = torch.arange(64.0) - 32
    for sigma in (0.8, 1.5, 2.5):
        edge = 100 + height * torch.special.ndtr(place / sigma)
        ratio = blur_statistics(edge[None, None, :].expand(1, 40, 64))["edge_ratio_strong"]
        # the central difference adds a variance of 1/3; the blur's five taps have one of 0.924
        expected = math.sqrt(1 + 0.924 / (sigma**2 + 1 / 3))
        assert abs(float(ratio) - expected) < 0.05


def noise(side, seed=0, sigma=0.08):
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + sigma * torch.randn(1, 3, side, side, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("factor", [0.3, 0.4, 0.7])
def test_an_enlarged_image_is_periodic_at_the_ratio_of_its_grids(factor):
    enlarged = resize(noise(round(120 * factor)), (120, 120), "bilinear")
    found = periodicity(luma_chroma(enlarged)[0])[0, FREQUENCIES:]
    frequencies = torch.linspace(0.05, 0.5, FREQUENCIES)
    folded = min(factor, 1 - factor)  # what lies beyond half a cycle per pixel folds back
    assert abs(float(frequencies[found.argmax()]) - folded) < 0.02
    assert found.max() > periodicity(luma_chroma(noise(120))[0])[0, FREQUENCIES:].max() + 1


def test_the_shape_of_noise_does_not_depend_on_its_level_but_on_its_grid():
    planes = [
        luma_chroma(image) for image in (noise(96), noise(96, sigma=0.04), resize(noise(48), (96, 96), "bicubic"))
    ]
    white, faint, coarse = (noise_shape(*pair)[0, : LAGS**2 - 1] for pair in planes)
    torch.testing.assert_close(white, faint, atol=0.03, rtol=0)
    assert (white - coarse).abs().max() > 0.2


@pytest.mark.parametrize("quality", [35, 62, 80])
def test_the_table_of_a_jpeg_agrees_best(quality):
    image = (noise(96) + torch.linspace(-0.3, 0.3, 96)).clamp(0, 1)
    agreement = table_agreement(block_dct(luma_chroma(jpeg(image, torch.tensor([float(quality)])))[0]))[0]
    near = min(range(len(QUALITIES)), key=lambda place: abs(QUALITIES[place] - quality))
    assert agreement[near] > 0.35
    assert agreement[near] > agreement.median() + 0.1


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (97, 33)])
def test_finite_and_independent_of_batch_mates(size):
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1))
    images[1] = 0.5
    found = image_traces(images)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(image_traces(images[:1])[0], found[0], atol=1e-3, rtol=1e-4)
