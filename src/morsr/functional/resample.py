"""Bicubic enlargement of one window of an image, so that an enlarged image need never exist as a whole.

The result is the same as cutting the window from `torch.nn.functional.interpolate(..., mode="bicubic")`.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBIC_A = -0.75
"""The free parameter of the cubic kernel, as in PyTorch's and OpenCV's bicubic."""


def edge_index(index: Tensor, size: int) -> Tensor:
    """Positions (int64, from 0) beyond the last of `size` pixels become the last pixel."""
    # As tensors and without a branch, for the size is a symbol where a network is exported.
    return torch.minimum(index, torch.zeros_like(index) + (size - 1))


def cubic_taps(index: Tensor, in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """Source pixels (n, 4), clamped to the image, and their weights (n, 4) in float32, of output positions (n,), int64.

    Source: Keys 1981, with pixel centres at half-integers.
    """
    # In float64, because float32 positions are off by 1e-3 of a pixel in images 10,000 pixels wide.
    position = (index.double() + 0.5) * (in_size / out_size) - 0.5
    base = position.floor()
    t = position - base
    a = CUBIC_A

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], dim=-1).float()
    source = base.long()[:, None] + torch.arange(-1, 3, device=index.device)
    return source.clamp(0, in_size - 1), weights


def unit_range(images: Tensor) -> Tensor:
    """Images as floats in [0, 1]: whole numbers (uint8, uint16) stand for fractions of their largest value."""
    if images.is_floating_point():
        return images
    return images.float() / float(torch.iinfo(images.dtype).max)


def bicubic_window(
    images: Tensor, size: tuple[int, int], *, top: int = 0, left: int = 0, height: int, width: int
) -> Tensor:
    """Enlarge images to `size` and return one window of the result, which may reach beyond it on the right and below.

    Args:
        images: (B, C, H, W), floats, or uint8 or uint16 as fractions of their largest value.
        size: height and width of the whole enlarged image; beyond it its last row and column repeat.
        top, left, height, width: the window in pixels of the enlarged image.

    Returns:
        (B, C, height, width) in the dtype of the images, float32 for whole numbers; not clamped.
    """
    taps = []
    for dim, start, length in ((-2, top, height), (-1, left, width)):
        # The positions are found on the host: some accelerators have no float64.
        positions = edge_index(torch.arange(start, start + length), size[dim])
        source, weights = cubic_taps(positions, images.shape[dim], size[dim])
        first, last = int(source.min()), int(source.max())
        images = images.narrow(dim, first, last - first + 1)
        taps.append((dim, source - first, weights))
    images = unit_range(images)
    for dim, source, weights in reversed(taps):  # columns first: of the fewer rows
        source, weights = source.to(images.device), weights.to(images)
        shape = (-1, 1) if dim == -2 else (-1,)
        parts = [images.index_select(dim, source[:, tap]).mul_(weights[:, tap].view(shape)) for tap in range(4)]
        images = parts[0].add_(parts[1]).add_(parts[2]).add_(parts[3])
    return images
