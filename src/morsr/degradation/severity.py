"""How severe a drawn degradation is: the ground truth that learned estimators, plots and tests compare with."""

from __future__ import annotations

import functools
import json
import math
from typing import NamedTuple

import torch
from torch import Tensor

from morsr.degradation.keys import sample_keys
from morsr.degradation.parameters import BlurParameters, DegradationParameters, StageParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.errors import InputError
from morsr.functional.corrupt import RESIZE_MODES
from morsr.functional.kernels import NONE, SINC, blur_kernels

REFERENCE_DRAWS = 10_000

# Shot noise at middle gray (0.5) in an image of 256 levels, in levels of 255: 255 * sqrt(0.5 / 256).
_SHOT_SIGMA = 255 * math.sqrt(0.5 / 256)
# Variance that interpolation without antialiasing leaves of white noise, averaged over the phase, at 2-D: (2/3)^2 for
# the triangle; bicubic (a = -0.75) from the same integral of its squared taps.
_BILINEAR_GAIN, _BICUBIC_GAIN = 4 / 9, 0.7347


class DegradationMeasures(NamedTuple):
    """Physical measures of drawn parameters, all (B,) float64.

    blur: effective standard deviation of all filters, in LR pixels. noise: standard deviation at the LR size before the
    last JPEG, in levels of 255, at middle gray. jpeg: the lower of the two qualities. resize: the smallest grid that
    the image passes through, as a factor of the LR size, at most 1.
    """

    blur: Tensor
    noise: Tensor
    jpeg: Tensor
    resize: Tensor


class DegradationSeverity(NamedTuple):
    """Ranks within the recipe's reference draw, all (B,) float32 in [0, 1], higher is worse; combined is their mean."""

    blur: Tensor
    noise: Tensor
    jpeg: Tensor
    resize: Tensor
    combined: Tensor


def degradation_measures(parameters: DegradationParameters, *, scale: int = 4) -> DegradationMeasures:
    """Measures of drawn parameters, from the parameters alone.

    A filter's width is the square root of half the trace of its second moments; a sinc filter's is that of the Gaussian
    whose response is 1/2 at the cut-off. Noise of the first order is followed through the second blur and both resizes,
    every filter taken as a Gaussian of its noise-equivalent width; a test compares the result with what `apply` leaves
    on flat gray. What JPEG does to the noise is left out.

    Args:
        parameters: B sets.
        scale: HR pixels per LR pixel.
    """
    host = parameters.to("cpu")
    first_grid = host.first.resize_scale.double() * scale  # pixels of each grid per LR pixel
    second_grid = host.second.resize_scale.double()
    pitch_first, pitch_second = 1 / first_grid, 1 / second_grid

    second_kernel = _kernel_moments(host.second.blur)
    final_kernel = _kernel_moments(host.final.blur)
    blur = (
        (_kernel_moments(host.first.blur)[0] / scale).square()
        + (second_kernel[0] * pitch_first).square()
        + final_kernel[0].square()
    ).sqrt()

    # Noise after the second order and after the last resize, as variance; `area` is what it is averaged over.
    area = pitch_first.square() * second_kernel[1] + _resize_area(pitch_first, pitch_second, host.second.resize_mode)
    one = torch.ones_like(pitch_second)
    last = _resize_area(pitch_second, one, host.final.resize_mode)
    last = torch.where(host.second.resize_scale == 1, torch.zeros_like(last), last) + final_kernel[1]
    variance = _noise_sigma(host.first).square() * pitch_first.square() / (pitch_first.square() + area + last)
    variance = variance + _noise_sigma(host.second).square() * pitch_second.square() / (pitch_second.square() + last)

    jpeg = torch.minimum(host.first.jpeg_quality, host.second.jpeg_quality).double()
    resize = torch.minimum(torch.minimum(first_grid, second_grid), one)
    return DegradationMeasures(blur=blur, noise=variance.sqrt(), jpeg=jpeg, resize=resize)


def true_severity(
    parameters: DegradationParameters, recipe: DegradationRecipe | str = "realesrgan", *, scale: int = 4
) -> DegradationSeverity:
    """Ground-truth severity: every measure's rank among 10,000 fixed draws of the recipe, and the mean of the four.

    Args:
        parameters: B sets.
        recipe: the recipe to rank within, as for `degrade`.
        scale: HR pixels per LR pixel.

    Returns:
        Ranks (B,) float32 in [0, 1] on the device of `parameters.key`; equal values share their mean rank.

    Raises:
        InputError: a scale below 1.
    """
    if scale < 1:
        raise InputError(f"scale: expected at least 1, got {scale}")
    settings = json.dumps(DegradationRecipe.load(recipe).to_dict(), sort_keys=True)
    ranks = [
        _rank(value, reference)
        for value, reference in zip(_harmful(parameters, scale), _reference(settings, scale), strict=True)
    ]
    device = parameters.key.device
    ranks.append(torch.stack(ranks).mean(dim=0))
    return DegradationSeverity(*(rank.to(device=device, dtype=torch.float32) for rank in ranks))


@functools.lru_cache(maxsize=16)
def _reference(settings: str, scale: int) -> tuple[Tensor, ...]:
    recipe = DegradationRecipe.from_dict(json.loads(settings))
    draws = recipe.sample(sample_keys(0, 0, torch.arange(REFERENCE_DRAWS)))
    return tuple(value.sort().values for value in _harmful(draws, scale))


def _harmful(parameters: DegradationParameters, scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    measures = degradation_measures(parameters, scale=scale)
    return measures.blur, measures.noise, 100 - measures.jpeg, -measures.resize


def _rank(value: Tensor, reference: Tensor) -> Tensor:
    below = torch.searchsorted(reference, value.contiguous(), right=False)
    up_to = torch.searchsorted(reference, value.contiguous(), right=True)
    return (below + up_to).to(torch.float64) / (2 * len(reference))


def _kernel_moments(blur: BlurParameters) -> tuple[Tensor, Tensor]:
    """Effective width in pixels, and the area in squared pixels by which it divides white noise's variance, less 1."""
    kernel = blur_kernels(**vars(blur)).double()
    axis = torch.arange(kernel.shape[-1], dtype=torch.float64) - kernel.shape[-1] // 2
    radius = axis.view(-1, 1).square() + axis.square()
    width = ((kernel * radius).sum(dim=(1, 2)) / 2).clamp_min(0).sqrt()
    cutoff = blur.cutoff.double()
    width = torch.where(blur.kind == SINC, math.sqrt(2 * math.log(2)) / cutoff, width)
    width = torch.where(blur.kind == NONE, torch.zeros_like(width), width)
    return width, 1 / kernel.square().sum(dim=(1, 2)) - 1


def _noise_sigma(stage: StageParameters) -> Tensor:
    """Standard deviation that the stage adds, in levels of 255."""
    level = stage.noise_level.double()
    return torch.where(stage.noise_kind == 0, level, level * _SHOT_SIGMA)


def _resize_area(before: Tensor, after: Tensor, mode: Tensor) -> Tensor:
    """What a resize from one pixel pitch to another adds to the averaging area, in squared LR pixels."""
    area = {
        "area": (after.square() - before.square()).clamp_min(0),
        "bilinear": before.square() * (1 / _BILINEAR_GAIN - 1),
        "bicubic": before.square() * (1 / _BICUBIC_GAIN - 1),
    }
    return torch.stack([area[name] for name in RESIZE_MODES]).gather(0, mode.view(1, -1)).squeeze(0)
