"""Layers that stay in float32 in a network that runs or is stored in half precision."""

from __future__ import annotations

from collections.abc import Callable

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


def to_float32(layer: nn.Module) -> nn.Module:
    """Return a float32 twin of a convolution, linear layer or group norm; other modules as they are.

    It holds the same weights; those that are stored in half precision become float32, of the values that they have.
    """
    twin: nn.Module
    if type(layer) is nn.Conv2d:
        twin = Float32Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    elif type(layer) is nn.Linear:
        twin = Float32Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif type(layer) is nn.GroupNorm:
        twin = Float32GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine, device="meta")
    else:
        return layer
    for name, parameter in layer.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
        setattr(twin, name, parameter)
    return twin.train(layer.training)
