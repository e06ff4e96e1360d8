"""Blur kernels of the Real-ESRGAN degradation family, one per image, and the filtering that applies them."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.errors import InputError

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
    kind: Tensor,
    size: Tensor,
    sigma_x: Tensor,
    sigma_y: Tensor,
    rotation: Tensor,
    beta: Tensor,
    cutoff: Tensor,
) -> Tensor:
    """One blur kernel per image, all on one canvas of 21 x 21 pixels.

    With q the squared distance under the covariance R diag(sigma_x^2, sigma_y^2) R^T, a Gaussian is exp(-q/2), a
    generalised Gaussian exp(-q^beta / 2), a plateau 1 / (1 + q^beta), each cut to size x size; "sinc" is the
    circularly symmetric ideal low-pass. Everything is computed in float64 and returned in float32.

    Args:
        kind: (B,) integers, places in `KERNEL_KINDS`.
        size: (B,) odd kernel sizes in pixels, at most 21; outside of it the kernel is zero.
        sigma_x, sigma_y: (B,) standard deviations in pixels; isotropic kinds read sigma_x only.
        rotation: (B,) radians; read by the anisotropic kinds.
        beta: (B,) shape; read by the generalised and plateau kinds.
        cutoff: (B,) radians per pixel, in (0, pi]; read by "sinc".

    Returns:
        (B, 21, 21) float32, each summing to 1.

    Raises:
        InputError: an even size, or one above 21.

    Source: basicsr/data/degradations.py, bivariate_Gaussian, bivariate_generalized_Gaussian, bivariate_plateau and
        circular_lowpass_kernel.
    """
    if bool((size % 2 == 0).any()) or int(size.max()) > SIDE:
        raise InputError(f"kernel sizes: expected odd sizes up to {SIDE}, got {sorted(set(size.tolist()))}")

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
    height, width = images.shape[-2:]
    if min(height, width) > pad:
        return F.pad(images, (pad, pad, pad, pad), mode="reflect")
    for dim, length in ((-2, height), (-1, width)):
        place = torch.arange(-pad, length + pad, device=images.device)
        period = max(2 * (length - 1), 1)
        place = place.remainder(period)
        images = images.index_select(
            images.ndim + dim, torch.minimum(place, period - place) if length > 1 else place * 0
        )
    return images


def filter_images(images: Tensor, kernels: Tensor) -> Tensor:
    """Cross-correlate every image with its own kernel, with mirrored borders.

    It is done in the frequency domain, where the cost does not grow with the kernel: several times as fast as a grouped
    convolution with 21 x 21 taps.

    Args:
        images: (B, C, H, W) float32.
        kernels: (B, k, k) or (1, k, k), k odd, float32.

    Returns:
        (B, C, H, W) float32.

    Raises:
        InputError: an even kernel, or a number of kernels that is neither 1 nor the number of images.

    Source: basicsr/utils/img_process_util.py, filter2D (the same result by a grouped convolution).
    """
    side = kernels.shape[-1]
    if side % 2 == 0 or kernels.shape[-2] != side:
        raise InputError(f"kernels: expected odd, square kernels, got {tuple(kernels.shape)}")
    if kernels.shape[0] not in (1, images.shape[0]):
        raise InputError(f"kernels: expected 1 or {images.shape[0]} of them, got {kernels.shape[0]}")
    half = kernels.shape[-1] // 2
    height, width = images.shape[-2:]
    padded = reflect_pad(images, half)
    size = tuple(_fast_length(length) for length in padded.shape[-2:])
    # The kernel is tiny beside the image: its spectrum is two small products with Fourier matrices, centred, so that
    # the output lines up with the input and no shift is needed.
    rows = _fourier_matrix(size[0], kernels.shape[-1], images.device)
    columns = _fourier_matrix(size[1], kernels.shape[-1], images.device)[: size[1] // 2 + 1]
    spectrum = rows @ (kernels.to(torch.complex64) @ columns.mT)
    product = torch.fft.rfft2(padded, s=size).mul_(spectrum.unsqueeze(1))
    return torch.fft.irfft2(product, s=size)[..., half : half + height, half : half + width]


@functools.lru_cache(maxsize=128)
def _fourier_matrix(length: int, side: int, device: torch.device) -> Tensor:
    """(length, side) complex64: exp(+2 pi i f x / length), x centred; the sign of a cross-correlation."""
    with torch.inference_mode(False):
        frequency = torch.arange(length, dtype=torch.float64).view(-1, 1)
        phase = frequency * (torch.arange(side, dtype=torch.float64) - side // 2) * (2 * math.pi / length)
        return torch.polar(torch.ones_like(phase), phase).to(torch.complex64).to(device)


@functools.lru_cache(maxsize=1024)
def _fast_length(length: int) -> int:
    """The smallest even length not under `length` whose only prime factors are 2, 3 and 5."""
    rest = length + length % 2
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return length if rest == 1 and length % 2 == 0 else _fast_length(length + 1)
