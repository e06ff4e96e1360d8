"""Physical measures of drawn parameters, from the parameters alone: blur, noise, JPEG quality and coarsest grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from morsr.degradation.parameters import DegradationParameters, StageParameters
from morsr.functional.corrupt import RESIZE_MODES
from morsr.functional.kernels import blur_kernels
from morsr.functional.resample import CUBIC_A

# Shot noise at middle gray (0.5) in an image of 256 levels, in levels of 255: 255 * sqrt(0.5 / 256).
_SHOT_SIGMA = 255 * math.sqrt(0.5 / 256)
# Variance that interpolation without antialiasing leaves of white noise, averaged over the phase, at 2-D: (2/3)^2 for
# the triangle; bicubic (a = -0.75) from the same integral of its squared taps.
_BILINEAR_GAIN, _BICUBIC_GAIN = 4 / 9, 0.7347
# Cycles per LR pixel at which the response of the chain is followed; the HR image itself has none beyond 2 at scale 4.
_FREQUENCIES = torch.linspace(0, 2, 81, dtype=torch.float64)[1:]
# A Gaussian of standard deviation s passes half at _HALF / s cycles.
_HALF = math.sqrt(math.log(2) / 2) / math.pi


class DegradationMeasures(NamedTuple):
    """Physical measures of B images, all (B,) float64.

    blur: standard deviation, in LR pixels, of the Gaussian that passes half at the frequency where the whole chain of
        filters and resizes does.
    noise: standard deviation at the LR size before the last JPEG, in levels of 255, at middle gray.
    jpeg: the lower of the two qualities.
    resize: the smallest grid that the image passes through, as a factor of the LR size, at most 1.
    """

    blur: Tensor
    noise: Tensor
    jpeg: Tensor
    resize: Tensor


def degradation_measures(parameters: DegradationParameters, *, scale: int = 4) -> DegradationMeasures:
    """Measures of B drawn parameters; `scale` is HR pixels per LR pixel.

    The blur is read from the product of the responses of all filters and resizes along both axes, each at its own grid:
    an area average passes a sinc, interpolation the transform of its kernel. Noise of the first order is followed
    through the second blur and both resizes, every filter taken as a Gaussian of its noise-equivalent width. What JPEG
    does to the noise is left out.
    """
    host = parameters.to("cpu")
    first_grid = host.first.resize_scale.double() * scale  # pixels of each grid per LR pixel
    second_grid = host.second.resize_scale.double()
    pitch_first, pitch_second = 1 / first_grid, 1 / second_grid
    one = torch.ones_like(pitch_second)

    kernels = [blur_kernels(**vars(part.blur)).double() for part in (host.first, host.second, host.final)]
    blur = _effective_blur(host, kernels, pitch_first, pitch_second, scale)

    # Noise after the second order and after the last resize, as variance; `area` is what it is averaged over.
    area = pitch_first.square() * _kernel_area(kernels[1]) + _resize_area(
        pitch_first, pitch_second, host.second.resize_mode
    )
    last = _resize_area(pitch_second, one, host.final.resize_mode)
    last = torch.where(host.second.resize_scale == 1, torch.zeros_like(last), last) + _kernel_area(kernels[2])
    variance = _noise_sigma(host.first).square() * pitch_first.square() / (pitch_first.square() + area + last)
    variance = variance + _noise_sigma(host.second).square() * pitch_second.square() / (pitch_second.square() + last)

    jpeg = torch.minimum(host.first.jpeg_quality, host.second.jpeg_quality).double()
    resize = torch.minimum(torch.minimum(first_grid, second_grid), one)
    return DegradationMeasures(blur=blur, noise=variance.sqrt(), jpeg=jpeg, resize=resize)


def _effective_blur(
    host: DegradationParameters, kernels: Sequence[Tensor], first: Tensor, second: Tensor, scale: int
) -> Tensor:
    """Standard deviation (B,) in LR pixels by the half response; first and second are the pitches of the two grids."""
    start, one = torch.full_like(first, 1 / scale), torch.ones_like(first)
    resized = (
        _resize_response(start, first, host.first.resize_mode)
        * _resize_response(first, second, host.second.resize_mode)
        * _resize_response(second, one, host.final.resize_mode)
    )
    total = resized[:, None]  # (B, axes, F)
    place = torch.arange(kernels[0].shape[-1], dtype=torch.float64) - kernels[0].shape[-1] // 2
    for kernel, pitch in zip(kernels, (start, first, one), strict=True):
        profiles = torch.stack([kernel.sum(dim=1), kernel.sum(dim=2)], dim=1)
        total = total * (profiles @ (2 * math.pi * pitch[:, None, None] * place[:, None] * _FREQUENCIES).cos())
    total = total.mean(dim=1)
    # where the response first falls under a half, between two frequencies by a straight line
    padded = torch.cat([torch.ones_like(total[:, :1]), total, torch.zeros_like(total[:, :1])], dim=1)
    step = float(_FREQUENCIES[0])
    after = (padded < 0.5).to(torch.int64).argmax(dim=1, keepdim=True)
    high, low = padded.gather(1, after - 1), padded.gather(1, after)
    half = step * (after - 1 + (high - 0.5) / (high - low)).squeeze(1)
    return _HALF / half


def _resize_response(before: Tensor, after: Tensor, mode: Tensor) -> Tensor:
    """What a resize from one pixel pitch to another passes (B, F) at _FREQUENCIES; pitches (B,) in LR pixels."""
    place = before[:, None] * _FREQUENCIES
    # averaging n samples of width b over a is nearly a box of sqrt(a^2 - b^2); enlarging repeats pixels of width b
    box = torch.where(after > before, (after.square() - before.square()).clamp_min(0).sqrt(), before)
    passed = {
        "area": torch.sinc(box[:, None] * _FREQUENCIES),
        "bilinear": torch.sinc(place).square(),
        "bicubic": _cubic_response(place),
    }
    chosen = torch.stack([passed[name] for name in RESIZE_MODES])[mode, torch.arange(len(mode))]
    return torch.where((before == after)[:, None], torch.ones_like(place), chosen)


def _cubic_response(frequency: Tensor) -> Tensor:
    """Fourier transform of the cubic kernel, at cycles per pixel above 0."""
    one, two, four = (torch.sinc(factor * frequency) for factor in (1, 2, 4))
    near, far = one.square() - two, 3 * two.square() - 2 * two - four
    return (3 * near + 2 * CUBIC_A * far) / (math.pi * frequency).square()


def _kernel_area(kernel: Tensor) -> Tensor:
    """The area in squared pixels by which filters (B, side, side) divide white noise's variance, less 1."""
    return 1 / kernel.square().sum(dim=(1, 2)) - 1


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
    return torch.stack([area[name] for name in RESIZE_MODES])[mode, torch.arange(len(mode))]
