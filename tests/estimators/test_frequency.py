"""The frequency estimator: calibrated, follows noise, blur and JPEG, and takes any image."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morsr.errors import InputError
from morsr.estimators import build_estimator
from morsr.estimators.frequency import piecewise_linear
from morsr.estimators.statistics import (
    QUALITIES,
    band_energies,
    block_dct,
    block_statistics,
    blur_statistics,
    image_statistics,
    luma_chroma,
    noise_statistics,
)
from morsr.functional.corrupt import jpeg

SIZES = [(1, 1), (8, 8), (1, 200), (300, 1), (17, 23), (128, 128), (129, 65), (400, 520)]


@pytest.fixture(scope="module")
def estimator():
    return build_estimator("frequency")


def scene(height=96, width=128, seed=0):
    """Random overlapping rectangles on a slope, softened as a camera would: edges of all heights, and flat areas."""
    rng = np.random.default_rng(seed)
    image = np.linspace(0.3, 0.6, 4 * width)[None, :, None] * np.ones((4 * height, 1, 3))
    for _ in range(60):
        top, left = rng.integers(0, 4 * height - 8), rng.integers(0, 4 * width - 8)
        high, wide = rng.integers(8, 2 * height), rng.integers(8, 2 * width)
        image[top : top + high, left : left + wide] = rng.uniform(0.1, 0.9, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return torch.nn.functional.avg_pool2d(tensor, 4)


def blurred(image, sigma):
    taps = torch.arange(-12.0, 13.0)
    kernel = (-0.5 * (taps / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, -1, -1, -1)
    padded = torch.nn.functional.pad(image, (12,) * 4, mode="replicate")
    once = torch.nn.functional.conv2d(padded, kernel, groups=3)
    return torch.nn.functional.conv2d(once, kernel.transpose(-2, -1), groups=3)


def noisy(image, sigma):
    generator = torch.Generator().manual_seed(1)
    return (image + sigma / 255 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def compressed(image, quality):
    return jpeg(image, torch.tensor([float(quality)])).mul(255).round().div(255)


@pytest.mark.parametrize(
    ("name", "make", "levels"),
    [
        ("noise", noisy, [1, 4, 8, 15, 30]),
        ("blur", blurred, [0.5, 0.8, 1.2, 1.8]),
        ("jpeg", compressed, [80, 55, 35]),
    ],
)
def test_scores_rise_with_the_degradation(estimator, name, make, levels):
    clean = torch.cat([scene(seed=seed) for seed in range(4)])
    scores = [estimator(torch.cat([make(image[None], level) for image in clean])) for level in levels]
    column = estimator.names.index(name)
    means = [float(result.scores[:, column].mean()) for result in scores]
    assert all(later > earlier for earlier, later in itertools.pairwise(means)), means
    assert means[-1] - means[0] > 0.15
    assert float(scores[-1].severity.mean()) > float(estimator(clean).severity.mean()) + 0.05


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_of_any_size_have_finite_scores(estimator, size, value):
    result = estimator(torch.full((2, 3, *size), value))
    assert result.scores.shape == (2, estimator.dim)
    assert torch.isfinite(result.scores).all()
    assert torch.isfinite(result.severity).all()


@given(height=st.integers(1, 150), width=st.integers(1, 150), seed=st.integers(0, 9))
def test_scores_are_finite_and_in_range(estimator, height, width, seed):
    image = torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    result = estimator(image)
    for values in (result.scores, result.severity):
        assert torch.isfinite(values).all()
        assert values.min() >= 0
        assert values.max() <= 1


def test_batch_mates_do_not_matter(estimator):
    images = torch.cat([noisy(scene(seed=seed), 3 * seed) for seed in range(5)])
    whole = estimator(images)
    for place in range(5):
        torch.testing.assert_close(
            estimator(images[place : place + 1]).scores, whole.scores[place : place + 1], atol=1e-4, rtol=0
        )
    turned = estimator(images.flip(0))
    torch.testing.assert_close(turned.scores.flip(0), whole.scores, atol=1e-4, rtol=0)


def test_float32_under_autocast_and_no_gradient(estimator):
    image = noisy(scene(), 5).requires_grad_()
    plain = estimator(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = estimator(image)
    assert under.scores.dtype == torch.float32
    assert not under.scores.requires_grad
    torch.testing.assert_close(under.scores, plain.scores, atol=0, rtol=0)
    half = estimator(image.detach().half())
    assert half.scores.dtype == torch.float32


@pytest.mark.parametrize(
    "image",
    [torch.full((1, 3, 8, 8), float("nan")), torch.ones(1, 1, 8, 8), torch.ones(3, 8, 8), 2 * torch.ones(1, 3, 8, 8)],
)
def test_bad_input_is_refused(estimator, image):
    with pytest.raises(InputError, match="lr"):
        estimator(image)


def test_noise_and_blocks_of_a_large_image_are_not_averaged_away(estimator):
    large = torch.nn.functional.interpolate(scene(), scale_factor=5, mode="bilinear")
    noise, blocks = estimator.names.index("noise"), estimator.names.index("jpeg")
    clean = estimator(large).scores[0]
    assert estimator(noisy(large, 15)).scores[0, noise] > clean[noise] + 0.2
    assert estimator(compressed(large, 35)).scores[0, blocks] > clean[blocks] + 0.2


def test_the_calibration_is_complete_and_stays_out_of_checkpoints(estimator):
    assert not estimator.state_dict()
    assert not list(estimator.parameters())
    assert set(estimator.statistics) == set(image_statistics(torch.rand(1, 3, 16, 16)))
    assert (estimator.knots.diff(dim=1) > 0).all()
    assert {"noise", "blur", "jpeg", "resize", "overall"} <= set(estimator.names)


def test_monotone_curve():
    knots = torch.tensor([[0.0, 1.0, 3.0]])
    values = torch.tensor([[-1.0], [0.5], [1.0], [2.0], [9.0]])
    expected = torch.tensor([[0.0], [0.25], [0.5], [0.75], [1.0]])
    torch.testing.assert_close(piecewise_linear(values, knots), expected)


# --- the statistics themselves ----------------------------------------------------------------------------------------


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
