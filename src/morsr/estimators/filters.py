"""Filters of small images as products with matrices, and order statistics: a crop is so small that operations count."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Taps(NamedTuple):
    """A filter of lines: kernel, pixels that each end is extended by first, how, and stride."""

    kernel: tuple[float, ...]
    border: tuple[int, int] = (0, 0)
    mode: str = "replicate"
    stride: int = 1


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function of hashable settings makes, in float32 and on the device that callers give last."""

    @functools.lru_cache(maxsize=256)
    def kept(*settings: Any) -> Tensor:
        with torch.inference_mode(False):
            return make(*settings[:-1]).float().to(settings[-1])

    return kept


@constant
def _bands(taps: Taps, length: int) -> Tensor:
    """The matrix (length, filtered) that filters lines from the right."""
    lines = F.pad(torch.eye(length, dtype=torch.float64)[:, None], taps.border, mode=taps.mode)
    return F.conv1d(lines, torch.tensor(taps.kernel, dtype=torch.float64)[None, None], stride=taps.stride)[:, 0]


def filtered(planes: Tensor, down: Taps, across: Taps) -> Tensor:
    """Filter planes (..., h, w) along columns, then along rows."""
    height, width = planes.shape[-2:]
    return _bands(down, height, planes.device).T @ planes @ _bands(across, width, planes.device)


def quantile(values: Tensor, share: float) -> Tensor:
    """A quantile over the last dimension, as `torch.quantile` interpolates it, by what is fast and in ONNX."""
    place = share * (values.shape[-1] - 1)
    lowest = values.topk(math.ceil(place) + 1, largest=False, sorted=False).values
    if place.is_integer():
        return lowest.amax(dim=-1)
    high, low = lowest.topk(2).values.unbind(dim=-1)
    return torch.lerp(low, high, place % 1)


def median(values: Tensor) -> Tensor:
    """The lower median over the last dimension."""
    return values.topk((values.shape[-1] + 1) // 2, largest=False, sorted=False).values.amax(dim=-1)
