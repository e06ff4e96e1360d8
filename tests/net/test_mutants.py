"""Small changes that leave every range and shape as it is, and still ruin the method or its data.

Those of the training step (balance without its factor, real and fake swapped, a feature loss without gradient) are
caught by test_golden_step.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from morsr import MoRConfig, adapter_parameters, inject
from morsr.degradation import DegradationRecipe, degradation_measures


def sampled(count: int) -> Any:
    return DegradationRecipe.load("realesrgan").sample(torch.arange(count))


def test_draws_that_should_be_independent_are() -> None:
    parameters = sampled(4000)
    drawn = {"key": torch.rand(4000)}
    for stage in ("first", "second"):
        part = getattr(parameters, stage)
        drawn |= {f"{stage} {name}": getattr(part.blur, name) for name in ("sigma_x", "sigma_y", "rotation")}
        drawn |= {f"{stage} {name}": getattr(part, name) for name in ("resize_scale", "jpeg_quality", "noise_gray")}
    matrix = np.corrcoef(torch.stack([value.double() for value in drawn.values()]).numpy())
    related = {
        (one, other): matrix[i, j]
        for (i, one), (j, other) in combinations(enumerate(drawn), 2)
        if not abs(matrix[i, j]) < 0.08  # five standard errors
    }
    assert related == {}


def test_anisotropic_kernels_are_longer_than_wide() -> None:
    blur = sampled(500).first.blur
    ratio = torch.maximum(blur.sigma_x / blur.sigma_y, blur.sigma_y / blur.sigma_x)
    assert (ratio > 1.2).float().mean() > 0.6


@pytest.mark.parametrize("layer", [nn.Linear(300, 40), nn.Conv2d(40, 40, 3)])
def test_gaussian_ranks_start_with_a_deviation_of_one_over_their_number(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    settings = {"num_ranks": 10, "num_shared": 4, "top_k": 2, "num_zero": 1, "targets": ("0",)}
    inject(model, MoRConfig(**settings, init="gaussian"), condition_dim=3)
    up, down = sorted(adapter_parameters(model)[:2], key=lambda parameter: float(parameter.detach().abs().sum()))
    assert up.count_nonzero() == 0
    assert down.std().item() == pytest.approx(1 / 10, rel=0.1)


@pytest.mark.parametrize(("number", "mode"), [(1, "bilinear"), (2, "bicubic")])
def test_the_noise_measure_knows_what_interpolation_leaves_of_noise(number: int, mode: str) -> None:
    parameters = sampled(1)

    def changed(part: Any, **values: float) -> Any:
        return replace(part, **{name: torch.full_like(getattr(part, name), value) for name, value in values.items()})

    unblurred = changed(parameters.final.blur, kind=7)
    parameters = replace(
        parameters,
        first=changed(parameters.first, noise_kind=0, noise_level=0),
        second=changed(parameters.second, noise_kind=0, noise_level=10, resize_scale=0.7),
        final=replace(changed(parameters.final, resize_mode=number), blur=unblurred),
    )
    noise = torch.randn(1, 1, 500, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = F.interpolate(noise, size=(713, 713), mode=mode, align_corners=False).std().item()
    assert degradation_measures(parameters).noise.item() == pytest.approx(10 * left, rel=0.02)
