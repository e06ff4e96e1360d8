"""NIQE, the natural image quality evaluator, as a pure function over batches of blocks.

Dimensions: B images, N blocks of one image, h and w the sides of a block, F features (36: 18 at each of two scales).

The arithmetic keeps the float32 roundings of basicsr's `calculate_niqe`, to which it is equal within 0.006 (largest
difference over 100 photographs): in flat regions the sign of a rounding error decides whether a pixel counts as darker
or brighter than its neighbourhood, so more exact arithmetic would score saturated images differently. All blocks go
through every step at once and the table of the generalised Gaussian is made once, which makes it some six times faster.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from morsr.errors import InputError, check_images
from morsr.functional.quality import rgb_to_y

BLOCK = 96  # side of a block at the first scale, as in the model of pristine images
_WINDOW_SIGMA = 7 / 6
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
# MATLAB's antialiased bicubic reduction by two: eight taps, the same for every output pixel.
_HALVING_TAPS = tuple(
    0.5 * (1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    for x in (1.75, 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75)
)


def niqe(images: Tensor, pristine_mean: Tensor, pristine_covariance: Tensor, *, luma: str = "ycbcr") -> Tensor:
    """Distance of an image's local statistics from those of pristine photographs.

    Args:
        images: RGB (B, 3, H, W) in [0, 1], at least 96 px high and wide, and with at least two blocks of 96x96.
        pristine_mean: (36,) mean of the features over pristine photographs.
        pristine_covariance: (36, 36) their covariance.
        luma: "ycbcr" (studio swing, as basicsr and MATLAB) or "yiq" (full swing, pyiqa's default).

    Returns:
        (B,) float64, range [0, inf), photographs about 3 to 5. Lower is better. NaN where fewer than two blocks have
        any texture.

    Raises:
        InputError: values that are not images in [0, 1], fewer than two blocks, or an unknown luma.

    Source:
        Mittal et al., "Making a completely blind image quality analyzer", IEEE SPL 2013, equations 1 to 10;
        basicsr/metrics/niqe.py in XPixelGroup/BasicSR.
    """
    check_images(images, name="niqe")
    blocks_high, blocks_wide = images.shape[-2] // BLOCK, images.shape[-1] // BLOCK
    if blocks_high * blocks_wide < 2:
        raise InputError(
            f"niqe: expected at least two blocks of {BLOCK}x{BLOCK} px to fit statistics to, "
            f"got an image of {images.shape[-2]}x{images.shape[-1]}"
        )
    images = images[..., : blocks_high * BLOCK, : blocks_wide * BLOCK].float()
    gray = _luma(images, luma).mul(255).round()
    scales = []
    for scale in (1, 2):
        normalized = _normalize(gray)
        side = BLOCK // scale
        blocks = rearrange(normalized, "b 1 (n h) (m w) -> (b n m) h w", h=side, w=side)
        scales.append(_block_features(blocks))
        if scale == 1:
            gray = _halve(gray)
    features = rearrange(torch.cat(scales, dim=-1), "(b n) f -> b n f", b=images.shape[0])
    mean = pristine_mean.to(features).reshape(-1)
    covariance = pristine_covariance.to(features)
    return torch.stack([_distance(one, mean, covariance) for one in features])


def _luma(images: Tensor, luma: str) -> Tensor:
    if luma == "ycbcr":
        return rgb_to_y(images)
    if luma == "yiq":
        return (images * images.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    raise InputError(f"niqe: expected luma 'ycbcr' or 'yiq', got {luma!r}")


def _normalize(gray: Tensor) -> Tensor:
    """Subtract the local mean and divide by the local deviation plus one (equation 1)."""
    mean = _gaussian_same(gray.double()).float()
    power = _gaussian_same(gray.square().double()).float()
    deviation = (power - mean.square()).abs().sqrt()
    return (gray - mean) / (deviation + 1)


def _gaussian_same(maps: Tensor) -> Tensor:
    """7x7 Gaussian filter with replicated borders, same size."""
    kernel = [math.exp(-(offset**2) / (2 * _WINDOW_SIGMA**2)) for offset in range(-3, 4)]
    total_weight = sum(kernel)
    for axis in (-1, -2):
        size = maps.shape[axis]
        first, last = maps.narrow(axis, 0, 1), maps.narrow(axis, size - 1, 1)
        padded = torch.cat([first, first, first, maps, last, last, last], dim=axis)
        total = maps * (kernel[3] / total_weight)
        for offset in range(3):
            mirrored = padded.narrow(axis, offset, size) + padded.narrow(axis, 6 - offset, size)
            total = total.add_(mirrored, alpha=kernel[offset] / total_weight)
        maps = total
    return maps


def _halve(gray: Tensor) -> Tensor:
    """Antialiased bicubic reduction by two, symmetric borders, computed on [0, 1] as the reference does."""
    maps = gray / 255
    for axis in (-2, -1):
        size = maps.shape[axis]
        head = maps.narrow(axis, 0, 3).flip(axis)
        tail = maps.narrow(axis, size - 3, 3).flip(axis)
        padded = torch.cat([head, maps, tail], dim=axis)
        even, odd = (
            padded.index_select(axis, torch.arange(start, size + 6, 2, device=maps.device)) for start in (0, 1)
        )
        half = size // 2
        taps = [(even, odd)[tap % 2].narrow(axis, tap // 2, half) * w for tap, w in enumerate(_HALVING_TAPS)]
        maps = torch.stack(taps).sum(dim=0)
    return maps * 255


def _block_features(blocks: Tensor) -> Tensor:
    """18 features of each block (N, h, w): the shape of its histogram and of its products with four neighbours."""
    alpha, left, right = _fit_asymmetric(blocks)
    features = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        alpha, left, right = _fit_asymmetric(blocks * torch.roll(blocks, shift, dims=(-2, -1)))
        mean = (right - left) * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))  # equation 8
        features += [alpha, mean, left, right]
    return torch.stack(features, dim=-1)


def _fit_asymmetric(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian of each block by moment matching: shape, left and right scale (equation 7)."""
    flat = rearrange(blocks, "n h w -> n (h w)")
    squares = flat.square()
    negative = flat < 0
    zero = (flat == 0).sum(dim=-1)
    count_left = negative.sum(dim=-1)
    count_right = flat.shape[-1] - count_left - zero
    power = squares.sum(dim=-1, dtype=torch.float64)
    power_left = (squares * negative).sum(dim=-1, dtype=torch.float64)
    # Empty sides give 0/0 on purpose: such a block has no fit and is left out of the covariance.
    left = (power_left / count_left).sqrt()
    right = ((power - power_left) / count_right).sqrt()
    ratio = left / right
    moment = flat.abs().sum(dim=-1, dtype=torch.float64).square() / (flat.shape[-1] * power)
    target = moment * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    shapes, table = _shape_table()
    shapes, table = shapes.to(target.device), table.to(target.device)
    # The table rises steadily, so the nearest entry is one of the two around the insertion point.
    above = torch.searchsorted(table, target.nan_to_num(0.0)).clamp(1, len(table) - 1)
    nearest = torch.where(target - table[above - 1] <= table[above] - target, above - 1, above)
    # The reference's argmin over all-NaN differences gives the first entry.
    alpha = shapes[torch.where(target.isnan(), 0, nearest)]
    scale = torch.exp((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2)
    return alpha, left * scale, right * scale


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Tensor, Tensor]:
    shapes = 0.2 + 0.001 * torch.arange(9801, dtype=torch.float64)
    inverse = 1 / shapes
    table = torch.exp(2 * torch.lgamma(2 * inverse) - torch.lgamma(inverse) - torch.lgamma(3 * inverse))
    return shapes, table


def _distance(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Distance between the fitted Gaussian of one image's blocks (N, F) and the pristine one (equation 10)."""
    complete = features[~features.isnan().any(dim=-1)]
    if len(complete) < 2:
        return features.new_tensor(math.nan)
    difference = mean - features.nanmean(dim=0)
    pooled = (covariance + torch.cov(complete.T)) / 2
    return (difference @ torch.linalg.pinv(pooled) @ difference).clamp_min(0).sqrt()
