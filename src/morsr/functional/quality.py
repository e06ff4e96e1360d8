"""PSNR and SSIM on luma, as the tables of real-world super-resolution define them.

Fixed here, since it moves a table by tenths of a decibel: luma of ITU-R BT.601 in studio swing, no border crop, PSNR on
unrounded luma, SSIM on luma rounded to whole 8-bit levels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from morsr.errors import InputError, check_images

_LUMA_WEIGHTS = (65.481, 128.553, 24.966)  # of 255, for RGB in [0, 1]
_SSIM_WINDOW = 11


def quantize_8bit(images: Tensor) -> Tensor:
    """Clamp floats of any shape to [0, 1] and round to the levels k/255 of a saved PNG (halves to the even level)."""
    return images.clamp(0, 1).mul(255).round().div(255)


def rgb_to_y(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 in studio swing, as MATLAB's `rgb2ycbcr`: RGB (B, 3, H, W) in [0, 1] to (B, 1, H, W) in
    [16/255, 235/255]."""
    weights = images.new_tensor(_LUMA_WEIGHTS).view(1, 3, 1, 1)
    return ((images * weights).sum(dim=1, keepdim=True) + 16) / 255


def psnr_y(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio on unrounded luma, no border crop.

    Args:
        sr, hr: images of one shape (B, 3, H, W), RGB in [0, 1].

    Returns:
        (B,) float64 in decibel, at most 80 (1e-8 is added to the squared error).

    Raises:
        InputError: shapes differ, or values are not finite images in [0, 1].

    Source: the protocol of StableSR's test sets, as OSEDiff publishes it; in pyiqa `psnr` with `test_y_channel=True,
        color_space="ycbcr"`.

    >>> psnr_y(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)).item()
    80.0
    """
    _check_pair(sr, hr, "psnr_y")
    error = (rgb_to_y(sr.double()) - rgb_to_y(hr.double())).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error + 1e-8)


def ssim_y(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity on luma rounded to 8-bit levels.

    Gaussian window 11x11 with standard deviation 1.5, valid region only, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2,
    contrast-structure term clamped at 0, mean over the map.

    Args:
        sr, hr: as for `psnr_y`, both sides at least 11 px.

    Returns:
        (B,) float64 in [0, 1].

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004,
        equation 13; in pyiqa `ssim` with `test_y_channel=True, color_space="ycbcr"`.
    """
    _check_pair(sr, hr, "ssim_y")
    if min(sr.shape[-2:]) < _SSIM_WINDOW:
        raise InputError(f"ssim_y: expected sides of at least {_SSIM_WINDOW} px, got {sr.shape[-2]}x{sr.shape[-1]}")
    # Luma in half precision would fall on other levels than the same pixels in float32.
    wide = (images.to(torch.promote_types(images.dtype, torch.float32)) for images in (sr, hr))
    x, y = (rgb_to_y(images).double().mul(255).round() for images in wide)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    batch = sr.shape[0]
    # One filter call for all moments; the sum of the two variances is all that the formula needs.
    moments = _gaussian_valid(torch.cat([x, y, x * x + y * y, x * y]))
    mean_x, mean_y, power, product = moments.split(batch)
    mean_product = mean_x * mean_y
    mean_power = mean_x.square() + mean_y.square()
    structure = (2 * (product - mean_product) + c2) / (power - mean_power + c2)
    luminance = (2 * mean_product + c1) / (mean_power + c1)
    return (luminance * structure.clamp_min(0)).mean(dim=(1, 2, 3))


def _check_pair(sr: Tensor, hr: Tensor, name: str) -> None:
    if sr.shape != hr.shape:
        raise InputError(f"{name}: expected two images of one size, got {tuple(sr.shape)} and {tuple(hr.shape)}")
    check_images(sr, name=f"{name}: sr")
    check_images(hr, name=f"{name}: hr")


@lru_cache(maxsize=1)
def _ssim_kernel() -> tuple[float, ...]:
    offsets = np.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    return tuple(weights / weights.sum())


def _gaussian_valid(maps: Tensor) -> Tensor:
    """Separable Gaussian filter of (..., H, W), valid region.

    Sums of shifted views are fifteen times as fast as `conv2d` in float64 on a CPU; float32 would lose the variances of
    bright flat regions.
    """
    kernel, half = _ssim_kernel(), _SSIM_WINDOW // 2
    for axis in (-1, -2):
        size = maps.shape[axis] - 2 * half
        total = maps.narrow(axis, half, size) * kernel[half]
        for offset in range(half):
            mirrored = maps.narrow(axis, offset, size) + maps.narrow(axis, 2 * half - offset, size)
            total = total.add_(mirrored, alpha=kernel[offset])
        maps = total
    return maps
