"""The shipped estimators' scores, and statistics against what they claim to measure."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scenes import blurred, compressed, noisy, scene

from morsr.estimators import build_estimator
from morsr.estimators.statistics import (
    FREQUENCIES,
    LAGS,
    QUALITIES,
    band_energies,
    block_statistics,
    blur_statistics,
    image_traces,
    luma_chroma,
    noise_shape,
    noise_statistics,
    periodicity,
)
from morsr.functional.corrupt import resize

# Of three drawn scenes: as drawn; with noise of 8 levels, at JPEG quality 60; blurred by 1.5 pixels.
SCORES = {
    "frequency": [
        [0.6145, 0.5618, 0.5578, 0.4396, 0.5401, 0.9644, 0.1988, 0.3761, 0.0000, 0.4845, 0.2947],
        [0.6705, 0.7032, 0.4857, 0.4645, 0.5112, 0.8087, 0.0823, 0.3726, 0.5083, 0.0399, 0.3901],
        [0.9766, 0.9486, 0.9702, 1.0000, 0.9737, 0.2158, 1.0000, 0.0010, 0.0000, 0.0068, 0.2242],
    ],
    "learned": [
        [0.0226, 0.0025, 0.2375, 0.2864, 0.1449],
        [0.2658, 0.2830, 0.3376, 0.5978, 0.3482],
        [0.9431, 0.0100, 0.2047, 0.3905, 0.4352],
    ],
}


@pytest.mark.parametrize("kind", SCORES)
def test_shipped_scores(kind):
    images = [scene(), compressed(noisy(scene(seed=1), 8), 60), blurred(scene(seed=2), 1.5)]
    found = build_estimator(kind)(torch.cat(images)).scores
    torch.testing.assert_close(found, torch.tensor(SCORES[kind]), atol=2e-3, rtol=0)


def test_a_wave_is_found_in_its_band():
    place = torch.arange(64.0)
    for cycles, band in ((0.03, 0), (0.1, 1), (0.2, 2), (0.4, 3)):
        wave = (128 + 50 * torch.cos(2 * math.pi * cycles * place))[None, None, :].expand(1, 48, 64)
        shares = band_energies(wave)[0]
        assert shares[band] > 0.9
        assert float(shares.sum()) == pytest.approx(1)


def test_noise_level_is_that_of_the_noise_in_gray_and_in_colour():
    flat = torch.full((1, 3, 96, 96), 0.5)
    for sigma, planes in itertools.product((2.0, 10.0, 25.0), (1, 3)):
        field = torch.randn((1, planes, 96, 96)) * sigma / 255
        assert 0.7 * sigma < noise_statistics((flat + field).clamp(0, 1))["noise"].exp() < 1.1 * sigma


@pytest.mark.parametrize("quality", [35, 62, 86])
def test_jpeg_shows_on_its_grid_and_by_its_table(quality):
    clean = noisy(scene(), 6)
    luma, chroma = luma_chroma(compressed(clean, quality))
    found, shifted = block_statistics(luma, chroma), block_statistics(luma[..., 3:, 3:], chroma[..., 3:, 3:])
    assert abs(100 - float(found["table"]) - quality) <= 2 * (QUALITIES[1] - QUALITIES[0])
    assert float(shifted["table"]) == 0
    assert found["block"] > max(shifted["block"], block_statistics(*luma_chroma(clean))["block"])


@pytest.mark.parametrize("height", [10.0, 100.0])
def test_edge_ratio_follows_width_and_not_height(height):
    place = torch.arange(64.0) - 32
    for sigma in (0.8, 1.5, 2.5):
        edge = 100 + height * torch.special.ndtr(place / sigma)
        ratio = blur_statistics(edge[None, None, :].expand(1, 40, 64))["edge_ratio_strong"]
        # the central difference adds a variance of 1/3; the blur's five taps have one of 0.924
        assert float(ratio) == pytest.approx(math.sqrt(1 + 0.924 / (sigma**2 + 1 / 3)), abs=0.05)


def test_enlarged_noise_is_periodic_and_coarser():
    white = (0.5 + 0.08 * torch.randn(1, 3, 120, 120)).clamp(0, 1)
    coarse = resize(white[..., :48, :48], (120, 120), "bilinear")
    (plain, _), (luma, _) = luma_chroma(white), luma_chroma(coarse)
    found = periodicity(luma)[0, FREQUENCIES:]
    assert abs(float(torch.linspace(0.05, 0.5, FREQUENCIES)[found.argmax()]) - 48 / 120) < 0.02
    assert found.max() > periodicity(plain)[0, FREQUENCIES:].max() + 1
    shapes = [noise_shape(*luma_chroma(image))[0, : LAGS**2 - 1] for image in (white, coarse, 0.5 * white)]
    assert (shapes[0] - shapes[1]).abs().max() > 0.2
    torch.testing.assert_close(shapes[0], shapes[2], atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (97, 33)])
def test_finite_and_independent_of_batch_mates(size):
    images = torch.rand(3, 3, *size)
    images[1] = 0.5
    found = image_traces(images)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(image_traces(images[:1])[0], found[0], atol=1e-3, rtol=1e-4)
