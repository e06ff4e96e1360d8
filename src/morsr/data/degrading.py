"""From what a loader gives to what a model gets: parameters are drawn on the CPU, images are degraded on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from morsr.data.dead_leaves import dead_leaves
from morsr.degradation import DegradationRecipe, apply, true_severity
from morsr.degradation.keys import mix, uniforms


class Degrading:
    """Makes the batches of `RealESRGANDataModule`, whose settings these are.

    Args:
        room: LR pixels by which the place of a window may vary along each side; None for no windows.
        side: of a window, in LR pixels.
    """

    def __init__(self, recipe: Any, val_recipe: Any, *, scale: int, room: int | None = None, side: int = 0) -> None:
        self.recipe, self.val_recipe = DegradationRecipe.load(recipe), DegradationRecipe.load(val_recipe)
        self.scale, self.room, self.side = scale, room, side
        self._once: dict[tuple[str, str], Tensor] = {}

    def draw(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with all that is made on the CPU: parameters, severity, places of windows, LR images of evaluation.

        The noise of a CPU and of a GPU differ, and scores are to be compared between them.
        """
        if "kind" not in batch or "parameters" in batch:
            return dict(batch)
        evaluated = "set" in batch
        parameters = (self.val_recipe if evaluated else self.recipe).sample(batch["key"])
        severity = true_severity(parameters, scale=self.scale).combined
        severity[_places(batch, "pair")] = torch.nan
        drawn = {**batch, "parameters": parameters, "severity": severity}
        if evaluated:
            for place in _places(batch, "photo"):
                drawn["lr"][place] = self._degraded_once(drawn, place)
        elif self.room is not None:
            places = uniforms(mix(batch["key"] + 2), 2) * (self.room + 1)
            drawn["windows"] = places.long().clamp(max=self.room).tolist()
        return drawn

    def _degraded_once(self, batch: dict[str, Any], place: int) -> Tensor:
        """The LR image uint8 (3, h, w) of one image of an evaluation batch, kept for the next validation."""
        name = (batch["set"][place], batch["stem"][place])
        if name not in self._once:
            hr = batch["hr"][place, None].float().div(255)
            self._once[name] = apply(hr, batch["parameters"][place, None], scale=self.scale)[0].mul(255).round().byte()
        return self._once[name]

    @torch.no_grad()
    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch that a model gets, on the device where the images are."""
        batch = self.draw(batch)
        batch |= {name: batch[name].float().div_(255) for name in ("hr", "lr") if name in batch}
        if "kind" in batch and "set" not in batch:
            self._degrade(batch)
        if "pair" in batch.pop("kind", []):
            del batch["parameters"]
        if "windows" in batch:
            windows = batch.pop("windows")
            batch |= {
                "score_lr": batch["lr"],
                "hr": _cut(batch["hr"], windows, self.side, self.scale),
                "lr": _cut(batch["lr"], windows, self.side, 1),
            }
        return batch

    def _degrade(self, batch: dict[str, Any]) -> None:
        """Render the synthetic HR images of a training batch, and make the LR images of all but pairs of files."""
        hr, leaves = batch["hr"], _places(batch, "leaves")
        if leaves:
            hr[leaves] = dead_leaves(batch["key"][leaves], hr.shape[-1])
        if made := sorted([*leaves, *_places(batch, "photo")]):
            batch["lr"][made] = apply(hr[made], batch["parameters"][made], scale=self.scale)


def _places(batch: dict[str, Any], kind: str) -> list[int]:
    return [place for place, found in enumerate(batch["kind"]) if found == kind]


def _cut(images: Tensor, windows: list[list[int]], side: int, factor: int) -> Tensor:
    """The windows of images (B, C, H, W), `side` LR pixels wide, each from its top and left in LR pixels on."""
    size = side * factor
    return torch.stack(
        [
            image[:, factor * top : factor * top + size, factor * left : factor * left + size]
            for image, (top, left) in zip(images, windows, strict=True)
        ]
    )
