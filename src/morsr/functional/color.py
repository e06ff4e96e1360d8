"""Give a restored image the colours of the image it was made from: wavelet and AdaIN correction, in any strength."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from morsr.errors import ConfigError, InputError

COLOR_METHODS = ("wavelet", "adain", "none")
WAVELET_LEVELS = 5


def wavelet_halo(levels: int = WAVELET_LEVELS) -> int:
    """How many pixels around a pixel decide its low frequencies: 1 + 2 + 4 + … = 2^levels − 1."""
    return 2**levels - 1


def wavelet_low(images: Tensor, *, levels: int = WAVELET_LEVELS) -> Tensor:
    """Low frequencies of the à-trous wavelet transform: the kernel [1 2 1] ⊗ [1 2 1] / 16 at dilations 1, 2, 4, …

    Args:
        images: (B, C, H, W), any size and range; borders are replicated.
        levels: how often the kernel is applied, with the dilation doubled each time.

    Returns:
        (B, C, H, W) in the range of the input.

    Source: StableSR's wavelet colour fix (IceClear/StableSR), in separable form.
    """
    if levels < 1:
        raise ConfigError(f"wavelet levels: expected at least 1, got {levels}")
    low = images
    for level in range(levels):
        dilation = 2**level
        for padding, dim in (((0, 0, dilation, dilation), -2), ((dilation, dilation, 0, 0), -1)):
            padded = F.pad(low, padding, mode="replicate")
            size = low.shape[dim]
            sides = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * dilation, size)
            low = sides.mul_(0.25).add_(low, alpha=0.5)
    return low


def wavelet_color(images: Tensor, reference: Tensor, *, strength: float = 1.0, levels: int = WAVELET_LEVELS) -> Tensor:
    """High frequencies of the images with the low frequencies of the reference.

    The transform is linear, so that images − low(images) + low(reference) is images + low(reference − images).

    Args:
        images: (B, C, H, W), nominally in [0, 1].
        reference: images of the same shape whose colours are wanted.
        strength: 0 leaves the images as they are, 1 replaces their low frequencies.
        levels: see `wavelet_low`.

    Returns:
        (B, C, H, W), not clamped.
    """
    _check_pair(images, reference, strength)
    return images + strength * wavelet_low(reference - images, levels=levels)


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of each image, both (B, C, 1, 1)."""

    mean: Tensor
    std: Tensor


def channel_statistics(images: Tensor) -> ChannelStatistics:
    """Mean and standard deviation over all pixels of each channel, in float32.

    Args:
        images: (B, C, H, W); one pixel has the deviation 0.
    """
    values = images.float()
    mean = values.mean(dim=(-2, -1), keepdim=True)
    return ChannelStatistics(mean, (values - mean).square().mean(dim=(-2, -1), keepdim=True).sqrt())


def adain_apply(
    images: Tensor, content: ChannelStatistics, style: ChannelStatistics, *, strength: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """Move channels with the statistics `content` to the statistics `style`; a part of an image may be given.

    Args:
        images: (B, C, H, W), a whole image or any part of it.
        content: statistics of the whole image.
        style: statistics that are wanted.
        strength: 0 leaves the image as it is, 1 gives it the wanted statistics.
        eps: deviation below which a channel counts as flat and only its mean is moved.
    """
    gain = torch.where(content.std > eps, style.std / content.std.clamp(min=eps), torch.ones_like(content.std))
    corrected = (images - content.mean) * gain + style.mean
    return torch.lerp(images, corrected.to(images.dtype), strength)


def adain_color(images: Tensor, reference: Tensor, *, strength: float = 1.0) -> Tensor:
    """Give each channel the mean and standard deviation that it has in the reference.

    Args:
        images: (B, C, H, W), nominally in [0, 1].
        reference: images of the same shape whose colours are wanted.
        strength: 0 leaves the images as they are, 1 gives them the reference's statistics.

    Returns:
        (B, C, H, W), not clamped.

    Source: adaptive instance normalisation, Huang and Belongie 2017, equation 8, on pixels.
    """
    _check_pair(images, reference, strength)
    return adain_apply(images, channel_statistics(images), channel_statistics(reference), strength=strength)


def match_color(images: Tensor, reference: Tensor, *, method: str = "wavelet", strength: float = 1.0) -> Tensor:
    """Correct colours by name.

    Args:
        images: (B, C, H, W), nominally in [0, 1].
        reference: images of the same shape whose colours are wanted.
        method: "wavelet", "adain" or "none".
        strength: 0 to 1.

    Raises:
        ConfigError: an unknown method or a strength outside [0, 1].
        InputError: shapes that differ.
    """
    check_color(method, strength)
    if method == "wavelet":
        return wavelet_color(images, reference, strength=strength)
    if method == "adain":
        return adain_color(images, reference, strength=strength)
    return images


def check_color(method: str, strength: float) -> None:
    """Check the two colour settings.

    Raises:
        ConfigError: an unknown method or a strength outside [0, 1].
    """
    if method not in COLOR_METHODS:
        raise ConfigError(f"color: expected one of {', '.join(COLOR_METHODS)}, got {method!r}")
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"color strength: expected 0 to 1, got {strength}")


def _check_pair(images: Tensor, reference: Tensor, strength: float) -> None:
    if images.ndim != 4 or images.shape != reference.shape:
        raise InputError(
            "colour correction: expected images and reference of one shape (B, C, H, W), "
            f"got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    check_color("none", strength)
