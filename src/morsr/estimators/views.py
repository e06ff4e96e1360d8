"""Bounded looks at an image of any size: crops at native resolution, and one anti-aliased view of the whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 128
GRID = 3
SMALLEST = 16


def pad_to_smallest(images: Tensor, smallest: int = SMALLEST) -> Tensor:
    """Replicate the border (B, C, H, W) to at least `smallest` pixels a side, so that strips have statistics too."""
    height, width = images.shape[-2:]
    right, bottom = max(0, smallest - width), max(0, smallest - height)
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images


def _starts(length: int, crop: int, grid: int, step: int) -> list[int]:
    count = min(grid, -(-length // crop))
    if count == 1:
        return [0]
    return [round(index * (length - crop) / (count - 1)) // step * step for index in range(count)]


def native_crops(images: Tensor, *, crop: int = CROP, grid: int = GRID, step: int = 8) -> Tensor:
    """Crops at native resolution on a regular grid: noise and 8-pixel blocks do not survive down-scaling.

    Args:
        images: (B, C, H, W).
        crop: side of a crop in pixels; a shorter image gives its whole side.
        grid: at most so many crops along each side, so that the cost is bounded.
        step: crops start at multiples of it, which keeps a JPEG grid where it is.

    Returns:
        (B, K, C, h, w) with K from 1 to grid squared.
    """
    height, width = images.shape[-2:]
    high, wide = min(height, crop), min(width, crop)
    return torch.stack(
        [
            images[..., top : top + high, left : left + wide]
            for top in _starts(height, crop, grid, step)
            for left in _starts(width, crop, grid, step)
        ],
        dim=1,
    )


def bounded_view(images: Tensor, limit: int = CROP) -> Tensor:
    """The whole image with its longer side at most `limit` pixels, by area averages (which do not alias)."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest <= limit:
        return images
    size = (max(1, round(height * limit / longest)), max(1, round(width * limit / longest)))
    return F.interpolate(images, size=size, mode="area")
