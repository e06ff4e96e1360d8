"""Traces that resizing and JPEG leave in an image's noise and edges; pure functions of native-resolution crops.

They go beyond `statistics.py`: a spectrum of periodic interpolation, the shape of the noise's autocorrelation, and the
agreement of the DCT coefficients with the table of every quality. Letters in shapes: N crops, h and w pixels (at least
16 each), F frequencies, M blocks of 8 x 8.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.estimators.statistics import block_dct, luma_chroma, table_agreement

FREQUENCIES = 40  # of the periodicity, from 0.05 to 0.5 cycles per pixel
LAGS = 4  # of the autocorrelation, each way


def periodicity(luma: Tensor) -> Tensor:
    """How strongly the size of differences varies periodically along rows and columns (N, 2 F).

    An enlarged image is smoother at interpolated pixels than at original ones, so the mean size of its first and second
    differences is periodic at the ratio of the two grids; blocks of JPEG are periodic at an eighth of the grid that
    they were made on, and at its multiples. The logarithm of the power at F frequencies over its median, both axes
    added.

    Args:
        luma: (N, h, w) in grey levels of 255.

    Source: A. C. Gallagher, Detection of linear and cubic interpolation in JPEG compressed images, 2005.
    """
    found = []
    for order in (1, 2):
        power = torch.zeros(())
        for plane in (luma, luma.transpose(-2, -1)):
            line = (plane.diff(dim=-1, n=order).abs() + 1).log().mean(dim=-2)
            smooth = F.avg_pool1d(F.pad(line[:, None], (6, 6), mode="reflect"), 13, stride=1)[:, 0]
            basis, energy = _fourier(line.shape[-1], line.device)
            parts = (line - smooth) @ basis
            power = parts.square().unflatten(-1, (2, FREQUENCIES)).sum(dim=1) / energy + power.to(luma.device)
        logarithm = (power + 1e-7).log()
        found.append(logarithm - logarithm.median(dim=-1, keepdim=True).values)
    return torch.cat(found, dim=1)


@functools.lru_cache(maxsize=64)
def _fourier(length: int, device: torch.device) -> tuple[Tensor, float]:
    window = torch.hann_window(length, periodic=False, dtype=torch.float64)
    frequency = torch.linspace(0.05, 0.5, FREQUENCIES, dtype=torch.float64)
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] * frequency
    basis = torch.cat([phase.cos(), phase.sin()], dim=1) * window[:, None]
    with torch.inference_mode(False):
        return basis.float().to(device), float(window.square().sum())


def noise_shape(luma: Tensor, chroma: Tensor) -> Tensor:
    """Autocorrelation of what Immerkaer's mask leaves in the flatter part of a crop, in luma and both chroma planes.

    White noise, noise that was enlarged or filtered since, and noise that JPEG took from the fine coefficients differ
    in it, whatever their level. Per plane LAGS^2 - 1 correlations at lags 0 to LAGS - 1 each way, and the log power:
    (N, 3 LAGS^2).

    Args:
        luma: (N, h, w) in grey levels of 255.
        chroma: (N, 2, h, w).
    """
    planes = torch.cat([luma[:, None], chroma], dim=1)
    mask = planes.new_tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6
    count = planes.shape[1]
    residual = F.conv2d(
        F.pad(planes, (1, 1, 1, 1), mode="replicate"), mask.expand(count, 1, 3, 3), groups=count
    )  # (N, 3, h, w)
    activity = F.avg_pool2d(residual.abs(), 9, stride=1, padding=4)
    # every second pixel each way is enough for the bound, and a sort is dear
    bound = activity[..., ::2, ::2].flatten(2).quantile(0.4, dim=2)
    flat = (activity <= bound[..., None, None]).to(residual.dtype)
    height, width = residual.shape[-2:]
    chosen = residual * flat

    def correlation(down: int, right: int) -> Tensor:
        there = residual[..., : height - down, : width - right]
        weight = flat[..., down:, right:].sum(dim=(-2, -1)).clamp_min(1)
        return (chosen[..., down:, right:] * there).sum(dim=(-2, -1)) / weight

    power = correlation(0, 0) + 0.01
    lags = [(down, right) for down in range(LAGS) for right in range(LAGS) if (down, right) != (0, 0)]
    shape = [correlation(*lag) / power for lag in lags]
    return torch.stack([*shape, power.log()], dim=-1).flatten(1)


def image_traces(crops: Tensor) -> Tensor:
    """All traces of native-resolution crops (N, 3, h, w) in [0, 1], h and w at least 16: (N, T)."""
    luma, chroma = luma_chroma(crops)
    return torch.cat([periodicity(luma), noise_shape(luma, chroma), table_agreement(block_dct(luma))], dim=1)
