"""Layers that stay in float32 in a network that runs or is stored in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from morsr.functional.precision import keep_float32, without_autocast


class _Float32(nn.Module):
    """Mixin: weights are not halved by `.to`, and the forward runs in their precision, autocast or not."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keep_float32(fn), recurse)

    def forward(self, inputs: Tensor) -> Tensor:
        with without_autocast(inputs.device):
            return super().forward(inputs.to(self.weight.dtype))  # type: ignore[arg-type]


class Float32Conv2d(_Float32, nn.Conv2d):
    """Conv2d in float32; takes any precision and gives float32."""

    computes_like = nn.Conv2d


class Float32Linear(_Float32, nn.Linear):
    """Linear in float32; takes any precision and gives float32."""

    computes_like = nn.Linear


class Float32GroupNorm(_Float32, nn.GroupNorm):
    """GroupNorm in float32; takes any precision and gives float32."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Float32Conv2d,
    nn.Linear: Float32Linear,
    nn.GroupNorm: Float32GroupNorm,
}


def to_float32(layer: Any) -> None:
    """Let a convolution, linear layer or group norm run in float32 from now on; other modules stay as they are.

    Weights in half precision become float32, of the values that they have.
    """
    if type(layer) in _KINDS:
        layer.__class__ = _KINDS[type(layer)]
        for parameter in layer.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
