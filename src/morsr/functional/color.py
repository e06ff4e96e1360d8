"""Luma, and a restored image with the colours of the image it was made from: the wavelet and the AdaIN transform."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""

WAVELET_LEVELS = 5
WAVELET_HALO = 2**WAVELET_LEVELS - 1
"""How many pixels around a pixel decide its low frequencies: 1 + 2 + 4 + …"""
_FLAT = 1e-4  # standard deviation of a channel without structure


def luma(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of RGB images (B, 3, H, W)."""
    return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def wavelet_low(images: Tensor) -> Tensor:
    """Low frequencies (B, C, H, W) of the à-trous wavelet transform: [1 2 1] ⊗ [1 2 1] / 16 at dilations 1, 2, 4, …

    Args:
        images: (B, C, H, W), any size and range; borders are replicated.

    Source: StableSR's wavelet colour fix (IceClear/StableSR), in separable form.
    """
    low = images
    for level in range(WAVELET_LEVELS):
        dilation = 2**level
        for padding, dim in (((0, 0, dilation, dilation), -2), ((dilation, dilation, 0, 0), -1)):
            padded = F.pad(low, padding, mode="replicate")
            size = low.shape[dim]
            sides = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * dilation, size)
            low = sides.mul_(0.25).add_(low, alpha=0.5)
    return low


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of each image, both (B, C, 1, 1)."""

    mean: Tensor
    std: Tensor


def adain_apply(
    images: Tensor, content: ChannelStatistics, style: ChannelStatistics, *, strength: float = 1.0
) -> Tensor:
    """Give an image, or a part of it, the mean and standard deviation per channel of another one.

    Args:
        images: (B, C, H, W), a whole image or any part of it.
        content: statistics of the whole image.
        style: statistics that are wanted.
        strength: 0 leaves the image as it is, 1 gives it the wanted statistics.

    Source: adaptive instance normalisation, Huang and Belongie 2017, equation 8, on pixels.
    """
    # of a flat channel only the mean is moved
    gain = torch.where(content.std > _FLAT, style.std / content.std.clamp(min=_FLAT), torch.ones_like(content.std))
    corrected = (images - content.mean) * gain + style.mean
    return torch.lerp(images, corrected.to(images.dtype), strength)
