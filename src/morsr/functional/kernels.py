"""Blur kernels of the Real-ESRGAN degradation family, one per image, and the filtering that applies them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_KINDS = (
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
    "sinc",
    "none",
)
"""Names of the kernel kinds; a kind's number is its place here. "none" is a pulse, which leaves the image as it is."""

SIDE = 21
"""Side of the largest kernel, in pixels."""
SINC = KERNEL_KINDS.index("sinc")
NONE = KERNEL_KINDS.index("none")


def blur_kernels(
    kind: Tensor, size: Tensor, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor, beta: Tensor, cutoff: Tensor
) -> Tensor:
    """One blur kernel per image, (B, 21, 21) float32, each summing to 1.

    With q the squared distance under the covariance R diag(sigma_x^2, sigma_y^2) R^T, a Gaussian is exp(-q/2), a
    generalised Gaussian exp(-q^beta / 2), a plateau 1 / (1 + q^beta), each cut to size x size; "sinc" is the
    circularly symmetric ideal low-pass. Computed in float64.

    Args:
        kind: (B,) integers, places in `KERNEL_KINDS`.
        size: (B,) odd kernel sizes in pixels, at most 21; outside of it the kernel is zero.
        sigma_x, sigma_y: (B,) standard deviations in pixels; isotropic kinds read sigma_x only.
        rotation: (B,) radians; read by the anisotropic kinds.
        beta: (B,) shape; read by the generalised and plateau kinds.
        cutoff: (B,) radians per pixel, in (0, pi]; read by "sinc".

    Source: basicsr/data/degradations.py, bivariate_Gaussian, bivariate_generalized_Gaussian, bivariate_plateau and
        circular_lowpass_kernel.
    """
    axis = torch.arange(SIDE, dtype=torch.float64, device=kind.device) - SIDE // 2
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    radius = torch.sqrt(x.square() + y.square())
    kernel = (radius == 0).to(torch.float64).repeat(len(kind), 1, 1)

    def rows(chosen: Tensor, *values: Tensor) -> list[Tensor]:
        return [value[chosen].to(torch.float64).view(-1, 1, 1) for value in values]

    # Every family is computed for its own images: powers and Bessel functions are what takes the time.
    for first in (0, 2, 4):
        chosen = (kind == first) | (kind == first + 1)
        angle, width_x, width_y, power = rows(chosen, rotation, sigma_x, sigma_y, beta)
        isotropic = (kind[chosen] == first).view(-1, 1, 1)
        width_y = torch.where(isotropic, width_x, width_y)
        along, across = torch.cos(angle) * x + torch.sin(angle) * y, torch.cos(angle) * y - torch.sin(angle) * x
        distance = (along / width_x).square() + (across / width_y).square()
        if first == 0:
            kernel[chosen] = torch.exp(-0.5 * distance)
        elif first == 2:
            kernel[chosen] = torch.exp(-0.5 * distance.pow(power))
        else:
            kernel[chosen] = 1 / (1 + distance.pow(power))
    chosen = kind == SINC
    (frequency,) = rows(chosen, cutoff)
    # The centre is the limit J1(z) / z -> 1/2.
    kernel[chosen] = torch.where(
        radius > 0,
        frequency * torch.special.bessel_j1(frequency * radius) / (2 * math.pi * radius.clamp_min(1e-12)),
        frequency.square() / (4 * math.pi),
    )
    half = torch.div(size, 2, rounding_mode="floor").view(-1, 1, 1)
    kernel = kernel * ((x.abs() <= half) & (y.abs() <= half))
    return (kernel / kernel.sum(dim=(1, 2), keepdim=True)).to(torch.float32)


def reflect_pad(images: Tensor, pad: int) -> Tensor:
    """Mirror-pad the last two dimensions without repeating the edge, whatever the size (torch stops at pad < size)."""
    if min(images.shape[-2:]) > pad:
        return F.pad(images, (pad, pad, pad, pad), mode="reflect")
    for dim in (-2, -1):
        last = images.shape[dim] - 1
        place = torch.arange(-pad, last + pad + 1, device=images.device).remainder(max(2 * last, 1))
        images = images.index_select(dim, torch.minimum(place, (2 * last - place).clamp_min(0)))
    return images


def filter_images(images: Tensor, kernels: Tensor) -> Tensor:
    """Cross-correlate every image with its own kernel, with mirrored borders.

    The product of two spectra costs the same for every kernel: several times less than a grouped convolution with
    21 x 21 taps.

    Args:
        images: (B, C, H, W) float32; so is the result.
        kernels: (B, k, k) or (1, k, k), k odd, float32.

    Source: basicsr/utils/img_process_util.py, filter2D (the same result by a grouped convolution).
    """
    height, width = images.shape[-2:]
    padded = reflect_pad(images, kernels.shape[-1] // 2)
    size = [-(-length // 32) * 32 for length in padded.shape[-2:]]  # lengths with large prime factors are slow
    product = torch.fft.rfft2(padded, s=size).mul_(torch.fft.rfft2(kernels, s=size).conj()[:, None])
    return torch.fft.irfft2(product, s=size)[..., :height, :width]
