"""Bounded looks at an image of any size: crops at native resolution, and one anti-aliased view of the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 128
GRID = 3
SMALLEST = 16


def pad_to_smallest(images: Tensor) -> Tensor:
    """Replicate the border (B, C, H, W) to at least 16 pixels a side, so that strips have statistics too."""
    height, width = images.shape[-2:]
    right, bottom = max(0, SMALLEST - width), max(0, SMALLEST - height)
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images


def _starts(length: int, crop: int, grid: int) -> list[int]:
    """Multiples of 8, which keeps a JPEG grid where it is."""
    count = min(grid, -(-length // crop))
    return [round(index * (length - crop) / max(count - 1, 1)) // 8 * 8 for index in range(count)]


def mean_over_crops(
    function: Callable[[Tensor], Tensor], images: Tensor, *, crop: int = CROP, grid: int = GRID
) -> Tensor:
    """Mean of a function over crops of each image at native resolution: noise and blocks do not survive down-scaling.

    Args:
        function: of crops (N, C, h, w), with N results.
        images: (B, C, H, W).
        crop: side of a crop in pixels; a shorter image gives its whole side.
        grid: at most so many crops along each side, so that the cost is bounded.
    """
    height, width = images.shape[-2:]
    high, wide = min(height, crop), min(width, crop)
    crops = [
        images[..., top : top + high, left : left + wide]
        for top in _starts(height, crop, grid)
        for left in _starts(width, crop, grid)
    ]
    return function(torch.cat(crops)).unflatten(0, (len(crops), len(images))).mean(dim=0)


def bounded_view(images: Tensor) -> Tensor:
    """The whole image with its longer side at 128 pixels, by area averages (which do not alias)."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    high, wide = (max(1, round(side * CROP / longest)) for side in (height, width))
    return F.interpolate(images, size=(high, wide), mode="area")
