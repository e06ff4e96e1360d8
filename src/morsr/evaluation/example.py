"""One image in depth: its scores, the ranks that are active for it, and what changes without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morsr.errors import ConfigError, InputError, check_images
from morsr.evaluation.routing import RoutingTable
from morsr.evaluation.specialisation import Specialisation
from morsr.functional.routing import Routing
from morsr.models.generator import OneStepGenerator, enlarge, pad_to_multiple


@dataclass(frozen=True)
class WithoutRanks:
    """The image restored with some ranks switched off.

    Attributes:
        name: which ranks.
        count: how many of the image's active ranks were switched off, over all layers.
        image: (3, H, W) in [0, 1].
        difference: root mean square change against the full result, in 8-bit steps.
    """

    name: str
    count: int
    image: Tensor
    difference: float


@dataclass(frozen=True)
class Example:
    """One image and what its ranks do.

    Attributes:
        name: of the image.
        routing: a table of this image alone.
        enlarged, restored: (3, H, W) in [0, 1]: bicubic, and with all its ranks.
        without: the image with groups of ranks switched off.
    """

    name: str
    routing: RoutingTable
    enlarged: Tensor
    restored: Tensor
    without: tuple[WithoutRanks, ...]

    @property
    def scores(self) -> dict[str, float]:
        """Degradation scores by name."""
        return dict(zip(self.routing.score_names, self.routing.scores[0].tolist(), strict=True))

    @property
    def severity(self) -> float:
        """In [0, 1]."""
        return self.routing.severity[0].item()


@torch.no_grad()
def examine(
    generator: OneStepGenerator,
    lr: Tensor,
    *,
    name: str = "image",
    scale: float = 4.0,
    specialisation: Specialisation | None = None,
    max_side: int = 96,
) -> Example:
    """Restore one image with and without groups of its ranks.

    Args:
        generator: with routed adapters, in evaluation mode.
        lr: (1, 3, h, w) in [0, 1]; larger images are centre-cropped to max_side for the restored pictures, while scores
            and routing come from the whole.
        name: of the image.
        scale: enlargement.
        specialisation: of many images; with it the slots of each kind of degradation are switched off as a group.
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
    before = adapters.routing
    crop = centre(lr, max_side)
    size = (round(crop.shape[-2] * scale), round(crop.shape[-1] * scale))
    enlarged = enlarge(crop, size)
    padded = pad_to_multiple(enlarged, generator.multiple)

    def restore(chosen: Routing) -> Tensor:
        adapters.route(chosen)
        return generator.decode(generator.denoise(generator.encode(padded)))[0, :, : size[0], : size[1]].clamp(0, 1)

    try:
        generator.route(lr)
        routing = adapters.routing
        assert routing is not None
        restored = restore(routing)
        without = []
        chosen = routing.gates[:, 0] > 0
        chosen[:, adapters.config.num_experts :] = False
        for label, off in _groups(chosen, specialisation):
            image = restore(routing._replace(gates=routing.gates.masked_fill(off[:, None], 0)))
            difference = (image - restored).square().mean().sqrt().item() * 255
            without.append(WithoutRanks(label, int((off & chosen).sum()), image.cpu(), difference))
    finally:
        adapters.route(before)
    table = RoutingTable.from_images(generator, lr, names=[name])
    return Example(name, table, enlarged[0].cpu(), restored.cpu(), tuple(without))


def _groups(chosen_LN: Tensor, specialisation: Specialisation | None) -> list[tuple[str, Tensor]]:
    """Named masks (L, N) of slots to switch off; kinds that no chosen slot stands for are left out."""
    groups = [("all routed ranks", torch.ones_like(chosen_LN))]
    if specialisation is not None:
        for index, kind in enumerate(specialisation.kinds):
            mask = ((specialisation.kind == index) & specialisation.significant()).to(chosen_LN.device)
            groups.append((f"the ranks for {kind}", mask))
    return [(label, mask) for label, mask in groups if (mask & chosen_LN).any()]


def centre(images: Tensor, side: int) -> Tensor:
    """The middle of images (..., h, w), at most `side` pixels each way."""
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + side, left : left + side]
