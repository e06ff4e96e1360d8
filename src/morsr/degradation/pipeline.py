"""Applying drawn parameters: HR images in, LR images out, every image on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from morsr.degradation.keys import noise_seed
from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.errors import InputError, check_images
from morsr.functional.corrupt import add_gaussian_noise, add_poisson_noise, jpeg, resize, unsharp_mask
from morsr.functional.kernels import blur_kernels, filter_images

SMALLEST_LR = 4


@torch.no_grad()
def apply(hr: Tensor, parameters: DegradationParameters, *, scale: int = 4) -> Tensor:
    """Degrade a batch by drawn parameters.

    Order: blur, resize, noise, JPEG; then blur, resize, noise; then resize to the LR size and sinc filter before or
    after the second JPEG; then 8 bits. Every image is worked on alone, so its result depends on neither its batch mates
    nor the batch size. Noise fields come from the image's key and a generator of the image's device: they
    are repeatable on one kind of device, and differ between CPU and GPU.

    Args:
        hr: (B, 3, H, W) in [0, 1], any floating type; the work is done in float32, under autocast too.
        parameters: B sets, from `DegradationRecipe.sample`.
        scale: HR pixels per LR pixel.

    Returns:
        (B, 3, H // scale, W // scale) float32 in [0, 1], on the device of `hr`, whole multiples of 1/255.

    Raises:
        InputError: not a batch of images, another number of parameter sets, a wrong scale, or images too small.

    Source: Real-ESRGAN, realesrgan_model.py, feed_data.
    """
    check_images(hr, name="hr")
    if len(parameters) != hr.shape[0]:
        raise InputError(f"parameters: expected {hr.shape[0]} sets, one per image, got {len(parameters)}")
    if not isinstance(scale, int) or scale < 1 or min(hr.shape[-2:]) < SMALLEST_LR * scale:
        least = f"{SMALLEST_LR} x {SMALLEST_LR} pixels per unit of a whole scale"
        raise InputError(f"hr: expected at least {least}, got {hr.shape[-2]} x {hr.shape[-1]} at scale {scale!r}")
    host = parameters.to("cpu")
    blurs = (host.first.blur, host.second.blur, host.final.blur)
    kernels = [blur_kernels(**vars(blur)).to(hr.device) for blur in blurs]
    with torch.autocast(device_type=hr.device.type, enabled=False):
        results = [
            _degrade_one(hr[place : place + 1].float(), row, [kernel[place : place + 1] for kernel in kernels], scale)
            for place, row in enumerate(host.rows())
        ]
    return torch.cat(results)


def degrade(
    hr: Tensor,
    recipe: DegradationRecipe | str = "realesrgan",
    *,
    scale: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Degrade a batch by parameters that are drawn from a recipe, a set per image; see `apply`.

    Args:
        hr, scale: see `apply`.
        recipe: see `DegradationRecipe.load`.
        generator: where the images' keys come from; None takes torch's global one.
    """
    recipe = DegradationRecipe.load(recipe)
    device = "cpu" if generator is None else generator.device
    keys = torch.randint(0, 2**63 - 1, (len(hr),), generator=generator, device=device)
    return apply(hr, recipe.sample(keys), scale=scale)


def _degrade_one(image: Tensor, row: dict[str, Any], kernels: list[Tensor], scale: int) -> Tensor:
    first, second, final = row["first"], row["second"], row["final"]
    height, width = image.shape[-2:]
    first_size, second_size = (
        (max(int(height / shrink * part["resize_scale"]), 1), max(int(width / shrink * part["resize_scale"]), 1))
        for part, shrink in ((first, 1), (second, scale))
    )
    generator = torch.Generator(device=image.device)

    image = unsharp_mask(image) if row["sharpen"] else image
    image = _blur(image, first["blur"], kernels[0])
    image = resize(image, first_size, first["resize_mode"], scale=first["resize_scale"])
    image = _noise(image, first, generator.manual_seed(noise_seed(row["key"], 0)))
    image = _jpeg(image, first)

    image = _blur(image, second["blur"], kernels[1])
    image = resize(image, second_size, second["resize_mode"])
    image = _noise(image, second, generator.manual_seed(noise_seed(row["key"], 1)))
    if not final["jpeg_last"]:
        image = _jpeg(image, second)
    image = resize(image, (height // scale, width // scale), final["resize_mode"])
    image = _blur(image, final["blur"], kernels[2])
    if final["jpeg_last"]:
        image = _jpeg(image.clamp(0, 1), second)
    return image.mul(255).round_().clamp_(0, 255).div_(255)


def _blur(image: Tensor, blur: dict[str, Any], kernel: Tensor) -> Tensor:
    return image if blur["kind"] == "none" else filter_images(image, kernel)


def _noise(image: Tensor, stage: dict[str, Any], generator: torch.Generator) -> Tensor:
    if stage["noise_level"] == 0:
        return image.clamp(0, 1)
    add = add_gaussian_noise if stage["noise_kind"] == "gaussian" else add_poisson_noise
    return add(image, stage["noise_level"], gray=stage["noise_gray"], generator=generator)


def _jpeg(image: Tensor, stage: dict[str, Any]) -> Tensor:
    quality = stage["jpeg_quality"]
    return image if quality > 100 else jpeg(image, torch.tensor([quality]))
