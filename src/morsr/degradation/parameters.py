"""The drawn parameters of a degradation: one full set per image, as tensors that travel with a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from morsr.functional.corrupt import RESIZE_MODES
from morsr.functional.kernels import KERNEL_KINDS

if TYPE_CHECKING:
    from typing_extensions import Self

NOISE_KINDS = ("gaussian", "poisson")
NO_JPEG = 101.0
"""A JPEG quality above 100 stands for no compression."""
# Numbers that stand for names in tensors.
_NAMES = {"kind": KERNEL_KINDS, "resize_mode": RESIZE_MODES, "noise_kind": NOISE_KINDS}


@dataclass(frozen=True)
class _Group:
    """A tree of tensors that share their first dimension, the images of a batch."""

    def _map(self, function: Any, *others: Any) -> Self:
        made = {}
        for field in fields(self):
            first, *rest = (getattr(group, field.name) for group in (self, *others))
            made[field.name] = first._map(function, *rest) if isinstance(first, _Group) else function(first, *rest)
        return type(self)(**made)

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to a device. `apply` reads parameters on the CPU: leave them there where you can."""
        return self._map(lambda value: value.to(device))

    def __getitem__(self, index: Any) -> Self:
        """Choose images by a slice, a mask or places; a single number keeps the batch dimension."""
        if isinstance(index, int):
            index = [range(len(self))[index]]
        return self._map(lambda value: value[index])

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self) -> list[dict[str, Any]]:
        """One nested dictionary of plain numbers and names per image; its key draws the same set again."""
        columns: dict[str, list[Any]] = {}
        for field in fields(self):
            value: Any = getattr(self, field.name)
            names = _NAMES.get(field.name)
            plain: list[Any] = value.rows() if isinstance(value, _Group) else value.tolist()
            columns[field.name] = [names[number] for number in plain] if names else plain
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class BlurParameters(_Group):
    """A blur kernel per image, all (B,): kind (place in KERNEL_KINDS), size in pixels, and what the kind reads."""

    kind: Tensor
    size: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    rotation: Tensor
    beta: Tensor
    cutoff: Tensor


@dataclass(frozen=True)
class StageParameters(_Group):
    """One order of the chain, all (B,): blur, resize factor and mode, noise, JPEG quality (above 100: none).

    noise_level is a standard deviation in levels of 255 for Gaussian noise and a factor on shot noise for Poisson.
    The factor of the first resize is relative to the HR image, that of the second to the LR image.
    """

    blur: BlurParameters
    resize_scale: Tensor
    resize_mode: Tensor
    noise_kind: Tensor
    noise_level: Tensor
    noise_gray: Tensor
    jpeg_quality: Tensor


@dataclass(frozen=True)
class FinalParameters(_Group):
    """The last step, all (B,): the filter at the LR size, the resize mode to it, the order.

    jpeg_last: True puts the second JPEG after resize and filter, False before them.
    """

    blur: BlurParameters
    resize_mode: Tensor
    jpeg_last: Tensor


@dataclass(frozen=True)
class DegradationParameters(_Group):
    """Everything that `apply` needs to repeat a degradation exactly, one set per image.

    key (B,) int64 seeds the noise fields; sharpen (B,) bool sharpens the HR image first.
    """

    key: Tensor
    sharpen: Tensor
    first: StageParameters
    second: StageParameters
    final: FinalParameters

    @classmethod
    def concatenate(cls, parts: Iterable[DegradationParameters]) -> DegradationParameters:
        """Join batches of parameters along the images."""
        first, *others = list(parts)
        return first._map(lambda *values: torch.cat(values), *others)
