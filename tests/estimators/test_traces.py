"""Traces of resizing and JPEG: where the periodicity lies, what the noise's shape tells, which table fits."""

from __future__ import annotations

import pytest
import torch

from morsr.estimators.statistics import QUALITIES, block_dct, luma_chroma, table_agreement
from morsr.estimators.traces import FREQUENCIES, LAGS, image_traces, noise_shape, periodicity
from morsr.functional.corrupt import jpeg, resize


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
