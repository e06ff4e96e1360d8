"""The shipped estimators' scores, and statistics against what they claim to measure."""

import itertools
import math

import pytest
import torch
from scenes import blurred, compressed, noisy, scene

from morsr.estimators import build_estimator
from morsr.estimators.statistics import QUALITIES, STATISTICS, Planes, image_statistics

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


def named(image):
    return dict(zip(STATISTICS, image_statistics(Planes.of(image))[0].tolist(), strict=True))


@pytest.mark.parametrize("kind", SCORES)
def test_shipped_scores(kind):
    images = [scene(), compressed(noisy(scene(seed=1), 8), 60), blurred(scene(seed=2), 1.5)]
    found = build_estimator(kind)(torch.cat(images)).scores
    torch.testing.assert_close(found, torch.tensor(SCORES[kind]), atol=2e-3, rtol=0)


def test_noise_level_is_that_of_the_noise_in_gray_and_in_colour():
    flat = torch.full((1, 3, 96, 96), 0.5)
    for sigma, planes in itertools.product((2.0, 10.0, 25.0), (1, 3)):
        field = torch.randn((1, planes, 96, 96)) * sigma / 255
        assert 0.7 * sigma < math.exp(named((flat + field).clamp(0, 1))["noise"]) < 1.1 * sigma


@pytest.mark.parametrize("quality", [35, 62, 86])
def test_jpeg_shows_on_its_grid_and_by_its_table(quality):
    clean = noisy(scene(), 6)
    lr = compressed(clean, quality)
    found, shifted, without = (named(image) for image in (lr, lr[..., 3:, 3:], clean))
    assert abs(100 - found["table"] - quality) <= 2 * (QUALITIES[1] - QUALITIES[0])
    assert shifted["table"] == 0
    assert found["block"] > max(shifted["block"], without["block"])
