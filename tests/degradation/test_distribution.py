"""The two engines draw from one distribution: mean, variance and radial spectrum of many patches.

Ours, drawn by our sampler, is compared with basicsr's chain, drawn by basicsr's own random functions. The yardstick is
the spread between two seeds of our engine on the same patches.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import oracle
import pytest
import torch
from einops import rearrange
from torch import Tensor

from morsr.degradation import DegradationRecipe, apply, sample_keys

RECIPE = DegradationRecipe()
pytestmark = pytest.mark.slow  # test_recipe.py and test_pipeline.py test draws and chain apart
GROUP = 64  # patches per mosaic of 8 x 8


def _ours(patches: Tensor, seed: int) -> Tensor:
    return apply(patches, RECIPE.sample(sample_keys(seed, 0, torch.arange(len(patches)))))


def _theirs(patches: Tensor, seed: int) -> Tensor:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    chain = oracle.Chain(RECIPE)
    return torch.cat([chain(patch) for patch in patches.split(1)])  # one at a time: its draws are shared by a batch


def _statistics(lr: Tensor) -> np.ndarray:
    """(groups, statistics): mean, mean variance, log power in six radial bands, per group of patches."""
    side = lr.shape[-1]
    power = torch.fft.fft2(lr.mean(dim=1) - lr.mean(dim=(1, 2, 3))[:, None, None]).abs().square()
    frequency = torch.fft.fftfreq(side)
    radius = torch.sqrt(frequency[:, None].square() + frequency.square())
    edges = torch.linspace(0.9 / side, 0.5, 7)
    bands = [power[:, (radius >= low) & (radius < high)].mean(dim=1) for low, high in itertools.pairwise(edges)]
    each = torch.stack(
        [lr.mean(dim=(1, 2, 3)), lr.var(dim=(2, 3)).mean(dim=1), *(band.add(1e-9).log() for band in bands)]
    )
    return rearrange(each, "s (g n) -> g s n", n=GROUP).mean(dim=-1).double().numpy()


def _assert_agree(first: np.ndarray, second: np.ndarray, other: np.ndarray) -> None:
    """The other engine is no further from the first seed than four standard errors of the two seeds' difference."""
    error = np.sqrt((first - second).var(axis=0, ddof=1) / len(first))
    distance = np.abs(((first + second) / 2 - other).mean(axis=0))
    assert (distance < 4 * error).all(), f"distances in standard errors: {np.round(distance / error, 2)}"


def _patches(images: list[np.ndarray], count: int, size: int) -> Tensor:
    generator = np.random.default_rng(0)
    crops = []
    for place in range(count):
        image = images[place % len(images)]
        top, left = (generator.integers(0, side - size + 1) for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def few() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """512 patches, and the statistics of two seeds of our engine."""
    from skimage import data

    patches = _patches([data.astronaut(), data.coffee(), data.chelsea(), data.rocket()], 8 * GROUP, 64)
    return patches, _statistics(_ours(patches, 1)), _statistics(_ours(patches, 2))


def test_few_patches_agree(few: tuple[Tensor, np.ndarray, np.ndarray]) -> None:
    patches, first, second = few
    _assert_agree(first, second, _statistics(_theirs(patches, 3)))


def test_another_recipe_does_not_agree(few: tuple[Tensor, np.ndarray, np.ndarray]) -> None:
    """The comparison can tell: a slightly milder recipe is found out."""
    patches, first, second = few
    milder = DegradationRecipe.load("pisasr").sample(sample_keys(3, 0, torch.arange(len(patches))))
    with pytest.raises(AssertionError, match="standard errors"):
        _assert_agree(first, second, _statistics(apply(patches, milder)))
