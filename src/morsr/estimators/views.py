"""Bounded looks at an image of any size: crops at native resolution, and one anti-aliased view of the whole.

Images are floats in [0, 1], or uint8 or uint16 as fractions of their largest value: of those only what is looked at is
made a float, so that a large image is scored in little memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.functional.resample import unit_range

CROP = 128
GRID = 3
SMALLEST = 16


def pad_to_smallest(images: Tensor) -> Tensor:
    """Replicate the border (B, C, H, W) to at least 16 pixels a side, so that strips have statistics too."""
    height, width = images.shape[-2:]
    right, bottom = max(0, SMALLEST - width), max(0, SMALLEST - height)
    return F.pad(unit_range(images), (0, right, 0, bottom), mode="replicate") if right or bottom else images


def _starts(length: int, crop: int, grid: int) -> list[int]:
    """Multiples of 8, which keeps a JPEG grid where it is."""
    count = min(grid, -(-length // crop))
    return [round(index * (length - crop) / max(count - 1, 1)) // 8 * 8 for index in range(count)]


def native_crops(images: Tensor, *, crop: int = CROP, grid: int = GRID) -> Tensor:
    """Crops (B, K, C, h, w) at native resolution on a regular grid: noise and blocks do not survive down-scaling.

    Args:
        images: (B, C, H, W).
        crop: side of a crop in pixels; a shorter image gives its whole side.
        grid: at most so many crops along each side, so that the cost is bounded.
    """
    height, width = images.shape[-2:]
    high, wide = min(height, crop), min(width, crop)
    return torch.stack(
        [
            unit_range(images[..., top : top + high, left : left + wide])
            for top in _starts(height, crop, grid)
            for left in _starts(width, crop, grid)
        ],
        dim=1,
    )


def bounded_view(images: Tensor) -> Tensor:
    """The whole image with its longer side at most 128 pixels, by area averages (which do not alias)."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest <= CROP:
        return unit_range(images)
    high, wide = (max(1, round(side * CROP / longest)) for side in (height, width))
    if images.is_floating_point():
        return F.interpolate(images, size=(high, wide), mode="area")
    spans = [(row * height // high, -(-(row + 1) * height // high)) for row in range(high)]
    rows = [F.interpolate(unit_range(images[..., first:last, :]), (1, wide), mode="area") for first, last in spans]
    return torch.cat(rows, dim=-2)
