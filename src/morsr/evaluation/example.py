"""One image in depth: its scores, the ranks that are active for it, and what changes without the routed ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morsr.errors import ConfigError, InputError, check_images
from morsr.evaluation.routing import RoutingTable
from morsr.models.generator import OneStepGenerator, enlarge, pad_to_multiple


@dataclass(frozen=True)
class Example:
    """One image and what its ranks do.

    Attributes:
        name: of the image.
        routing: a table of this image alone.
        enlarged, restored, shared: (3, H, W) in [0, 1]: bicubic, with all its ranks, by the shared ranks alone.
    """

    name: str
    routing: RoutingTable
    enlarged: Tensor
    restored: Tensor
    shared: Tensor

    @property
    def scores(self) -> dict[str, float]:
        """Degradation scores by name."""
        return dict(zip(self.routing.score_names, self.routing.scores[0].tolist(), strict=True))

    @property
    def severity(self) -> float:
        """In [0, 1]."""
        return self.routing.severity[0].item()

    @property
    def change(self) -> float:
        """Root mean square change by the routed ranks, in 8-bit steps."""
        return (self.restored - self.shared).square().mean().sqrt().item() * 255


@torch.no_grad()
def examine(
    generator: OneStepGenerator, lr: Tensor, *, name: str = "image", scale: float = 4.0, max_side: int = 96
) -> Example:
    """Restore one image with and without its routed ranks.

    Args:
        generator: with routed adapters, in evaluation mode.
        lr: (1, 3, h, w) in [0, 1]; larger images are centre-cropped to max_side for the restored pictures, while scores
            and routing come from the whole.
        name: of the image.
        scale: enlargement.
        max_side: longest side of the crop, in LR pixels.

    Raises:
        ConfigError: a generator without routing.
        InputError: not one image.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.is_routed:
        raise ConfigError("this model has no routing: there are no ranks to switch off")
    if len(check_images(lr, name="lr")) != 1:
        raise InputError(f"lr: expected one image, got {len(lr)}")
    crop = centre(lr, max_side)
    height, width = (round(side * scale) for side in crop.shape[-2:])
    enlarged = enlarge(crop, (height, width))
    before = adapters.routing
    images = []
    try:
        generator.route(lr)
        routing = adapters.routing
        assert routing is not None
        for chosen in (routing, routing._replace(gates=torch.zeros_like(routing.gates))):
            adapters.route(chosen)
            latents = generator.encode(pad_to_multiple(enlarged, generator.multiple))
            image = generator.decode(generator.denoise(latents))
            images.append(image[0, :, :height, :width].clamp(0, 1).cpu())
    finally:
        adapters.route(before)
    return Example(name, RoutingTable.from_images(generator, lr, names=[name]), enlarged[0].cpu(), *images)


def centre(images: Tensor, side: int) -> Tensor:
    """The middle of images (..., h, w), at most `side` pixels each way."""
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + side, left : left + side]
