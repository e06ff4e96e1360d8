"""The drawn parameters of a degradation: one full set per image, as tensors that travel with a batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from morsr.errors import InputError
from morsr.functional.corrupt import RESIZE_MODES
from morsr.functional.kernels import KERNEL_KINDS

NOISE_KINDS = ("gaussian", "poisson")
_NAMES = {"kind": KERNEL_KINDS, "mode": RESIZE_MODES, "noise_kind": NOISE_KINDS}

_Group = TypeVar("_Group", bound="_TensorGroup")


@dataclass(frozen=True)
class _TensorGroup:
    """A tree of tensors that share their first dimension, the images of a batch."""

    def _map(self: _Group, function: Any, *others: _Group) -> _Group:
        made = {}
        for field in dataclasses.fields(self):
            values = [getattr(group, field.name) for group in (self, *others)]
            made[field.name] = (
                values[0]._map(function, *values[1:]) if isinstance(values[0], _TensorGroup) else function(*values)
            )
        return type(self)(**made)

    def to(self: _Group, device: torch.device | str, *, non_blocking: bool = False) -> _Group:
        """Move every tensor to a device. `apply` reads parameters on the CPU: leave them there where you can."""
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def __getitem__(self: _Group, index: Any) -> _Group:
        """Choose images by a slice, a mask, a list or a tensor of places; a single number keeps the batch dimension."""
        if isinstance(index, int):
            count = len(self)
            if not -count <= index < count:
                raise IndexError(f"image {index} of {count}")
            index = [index % count]
        return self._map(lambda value: value[index])

    def __len__(self) -> int:
        value = getattr(self, dataclasses.fields(self)[0].name)
        return len(value)

    def rows(self) -> list[dict[str, Any]]:
        """One nested dictionary of plain numbers and names per image."""
        columns: dict[str, list[Any]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _TensorGroup):
                columns[field.name] = value.rows()
            else:
                numbers = value.tolist()
                names = _NAMES.get("noise_kind" if field.name == "noise_kind" else field.name.rsplit("_", 1)[-1])
                columns[field.name] = [names[number] for number in numbers] if names else numbers
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class BlurParameters(_TensorGroup):
    """A blur kernel per image, all (B,): kind (place in KERNEL_KINDS), size in pixels, and what the kind reads."""

    kind: Tensor
    size: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    rotation: Tensor
    beta: Tensor
    cutoff: Tensor


@dataclass(frozen=True)
class StageParameters(_TensorGroup):
    """One order of the chain, all (B,): blur, resize factor and mode, noise, JPEG quality.

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
class FinalParameters(_TensorGroup):
    """The last step, all (B,): the sinc filter (kind "none" leaves it out), the resize mode to the LR size, the order.

    jpeg_last: True puts the second JPEG after resize and sinc filter, False before them.
    """

    blur: BlurParameters
    resize_mode: Tensor
    jpeg_last: Tensor


@dataclass(frozen=True)
class DegradationParameters(_TensorGroup):
    """Everything that `apply` needs to repeat a degradation exactly, one set per image.

    key (B,) int64 seeds the noise fields; sharpen (B,) bool sharpens the HR image before all else.
    """

    key: Tensor
    sharpen: Tensor
    first: StageParameters
    second: StageParameters
    final: FinalParameters

    def to_jsonl(self, *, extra: Sequence[dict[str, Any]] | None = None) -> str:
        """One JSON object per line and image; `extra` adds entries (a file name, say) to each.

        Raises:
            InputError: `extra` has another length than the batch.
        """
        extra = [{}] * len(self) if extra is None else extra
        if len(extra) != len(self):
            raise InputError(f"extra: expected {len(self)} entries, one per image, got {len(extra)}")
        return "".join(json.dumps({**more, **row}) + "\n" for more, row in zip(extra, self.rows(), strict=True))

    @classmethod
    def from_jsonl(cls, text: str) -> DegradationParameters:
        """Read back what `to_jsonl` wrote; entries that it added by `extra` are passed over.

        Raises:
            InputError: no line, a line that is not JSON, or one that lacks an entry.
        """
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not rows:
                raise InputError("parameters: expected at least one JSON line, got none")
            return _read(cls, rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"parameters: expected lines as to_jsonl writes them, got an error: {error!r}") from error

    @classmethod
    def concatenate(cls, parts: Iterable[DegradationParameters]) -> DegradationParameters:
        """Join batches of parameters along the images."""
        first, *others = list(parts)
        return first._map(lambda *values: torch.cat(values), *others)


_GROUPS: dict[str, type[_TensorGroup]] = {"first": StageParameters, "second": StageParameters, "final": FinalParameters}


def _read(group: type[_Group], rows: list[dict[str, Any]]) -> _Group:
    made: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        values = [row[field.name] for row in rows]
        if isinstance(values[0], dict):
            made[field.name] = _read(_GROUPS.get(field.name, BlurParameters), values)
            continue
        names = _NAMES.get("noise_kind" if field.name == "noise_kind" else field.name.rsplit("_", 1)[-1])
        if names:
            unknown = [value for value in values if value not in names]
            if unknown:
                raise InputError(f"{field.name}: expected one of {', '.join(names)}, got {unknown[0]!r}")
            made[field.name] = torch.tensor([names.index(value) for value in values])
        elif field.name in ("key", "size"):
            made[field.name] = torch.tensor(values, dtype=torch.int64)
        else:
            made[field.name] = torch.tensor(values, dtype=None if isinstance(values[0], bool) else torch.float32)
    return group(**made)
