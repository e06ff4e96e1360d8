"""What a routing table is made of: images in batches, known degradations, names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.degradation.severity import true_severity
from morsr.errors import InputError
from morsr.imaging.files import read_planes


def image_batches(images: Tensor | Sequence[Any], batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Runs of neighbouring images of one size, as tensors (B, 3, H, W) on the device."""
    if isinstance(images, Tensor):
        yield from (part.to(device) for part in images.split(batch_size))
        return
    waiting: list[Tensor] = []
    for image in images:
        rgb = read_planes(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
        if len(rgb) != 1:
            raise InputError(f"images: expected one image per entry, got a batch of {len(rgb)}")
        if waiting and (waiting[0].shape != rgb.shape or len(waiting) == batch_size):
            yield torch.cat(waiting).to(device)
            waiting = []
        waiting.append(rgb)
    if waiting:
        yield torch.cat(waiting).to(device)


def true_severities(parameters: Any, recipe: DegradationRecipe | str, count: int) -> dict[str, Tensor]:
    """What is known of the degradations as severities by kind, each (I,)."""
    if parameters is None:
        return {}
    if isinstance(parameters, DegradationParameters):
        parameters = true_severity(parameters, recipe)
    named = parameters._asdict() if hasattr(parameters, "_asdict") else parameters
    # The combined severity is no kind: it would win or lose against its own parts.
    truth = {name: torch.as_tensor(values).float().cpu() for name, values in named.items() if name != "combined"}
    for name, values in truth.items():
        if values.shape != (count,) or not values.isfinite().all():
            raise InputError(f"parameters: {name}: expected {count} finite severities, got shape {tuple(values.shape)}")
    return truth


def unique_names(names: Sequence[str]) -> list[str]:
    """Names made different by a number where several images share one."""
    taken: dict[str, None] = {}
    for name in names:
        free, number = name, 1
        while free in taken:
            number += 1
            free = f"{name} ({number})"
        taken[free] = None
    return list(taken)
