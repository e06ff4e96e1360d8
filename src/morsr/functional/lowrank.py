"""Low-rank updates of linear and convolutional layers, with ranks that may differ from image to image.

Dimensions: B images, T tokens, I input features per group, O output features, R ranks, G groups, P output pixels.
A rank is one row of ``down`` and one row of ``up``: its weight update is ``outer(up[r], down[r])``, so for a
convolution ``down`` holds whole kernels and every rank can be folded into the layer's weight, whatever its groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class ConvGeometry(NamedTuple):
    """What a convolution does besides its weights; fields as in torch.nn.Conv2d."""

    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()  # widths as torch.nn.functional.pad wants them, used where padding_mode is not "zeros"


def add_lowrank_weight(weight: Tensor, down: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Fold ranks into a weight: added in float32 (float64 for float64) and rounded once to the weight's dtype.

    Args:
        weight: (O, ...).
        down: (R, ...) one row of input features, or one kernel (I, kh, kw), per rank.
        up: (R, O), gates and scale already multiplied in.
        out: where to write it, like ``weight`` in shape, dtype and memory format; a new tensor if None.

    Returns:
        ``out``, or a new tensor in the dtype and memory format of ``weight``.
    """
    if weight.ndim == 4 and _channels_last(weight):
        weight, down = (rearrange(kernels, "o i h w -> o h w i") for kernels in (weight, down))
        out = None if out is None else rearrange(out, "o i h w -> o h w i")
        return rearrange(add_lowrank_weight(weight, down, up, out=out), "o h w i -> o i h w")
    dtype = torch.promote_types(torch.float32, weight.dtype)
    factors = weight.flatten(1).to(dtype), up.to(dtype).t(), down.flatten(1).to(dtype)
    # One product reads the weight and writes the sum, for a merge is bound by memory and not by its operations; most of
    # its time goes to touching new memory, so memory that is there already is written in place.
    if out is not None and out.dtype == dtype:
        return torch.addmm(*factors, out=out.flatten(1)).view(out.shape)
    total = torch.addmm(*factors).view(weight.shape)
    return total.to(weight.dtype) if out is None else out.copy_(total)


def add_lowrank_linear(output: Tensor, inputs: Tensor, down: Tensor, up: Tensor, *, in_place: bool = False) -> Tensor:
    """Add a low-rank update to the output of a linear layer.

    Args:
        output: (B, ..., O) what the layer computed.
        inputs: (B, ..., I) what it was given.
        down: (R, I) for all images, or (B, R, I) one set per image.
        up: (R, O) or (B, R, O), gates and scale already multiplied in.
        in_place: write the sum into ``output``, which saves a copy of it; for passes without gradients.

    Returns:
        (B, ..., O) in the dtype of ``output``.
    """
    if down.ndim == 2 and up.ndim == 2:
        hidden = F.linear(inputs, down)
        flat = output.reshape(-1, output.shape[-1])
        return _add_product(flat, hidden.reshape(-1, hidden.shape[-1]), up, in_place).view(output.shape)
    batch = inputs.shape[0]
    tokens = inputs.reshape(batch, -1, inputs.shape[-1])
    hidden = F.linear(tokens, down) if down.ndim == 2 else torch.bmm(tokens, down.transpose(1, 2))
    return _add_product(output.reshape(batch, -1, output.shape[-1]), hidden, up, in_place).view(output.shape)


def add_lowrank_conv2d(
    output: Tensor, inputs: Tensor, down: Tensor, up: Tensor, geometry: ConvGeometry, *, in_place: bool = False
) -> Tensor:
    """Add a low-rank update to the output of a 2-D convolution.

    Args:
        output: (B, O, H', W') what the layer computed.
        inputs: (B, G·I, H, W) what it was given.
        down: (R, I, kh, kw) for all images, or (B, R, I, kh, kw) one set per image.
        up: (R, O) or (B, R, O), gates and scale already multiplied in.
        geometry: stride, padding, dilation and groups of the layer.
        in_place: write the sum into ``output``, which saves a copy of it; for passes without gradients.

    Returns:
        (B, O, H', W') in the dtype and memory format of ``output``.
    """
    hidden = _reduce(inputs, down, geometry)  # (B·G, R, H', W')
    if geometry.groups > 1:
        return _expand_groups(output, hidden, up, geometry.groups)
    batch, channels = output.shape[:2]
    if up.ndim == 3 and batch != 1:
        if _channels_last(output):
            result = _add_product(_rows(output), _rows(hidden), up, in_place)
            return rearrange(result, "b (h w) o -> b o h w", h=output.shape[2])
        return _add_product(output.flatten(2), up.transpose(1, 2), hidden.flatten(2), in_place).view(output.shape)
    up = up.reshape(-1, channels)
    if _channels_last(output):
        result = _add_product(_rows(output).flatten(0, 1), _rows(hidden).flatten(0, 1), up, in_place)
        return rearrange(result, "(b h w) o -> b o h w", b=batch, h=output.shape[2])
    if batch == 1:
        flat = output.reshape(channels, -1)
        return _add_product(flat, up.t(), hidden.reshape(up.shape[0], -1), in_place).view(output.shape)
    up = up.t().expand(batch, -1, -1)
    return _add_product(output.flatten(2), up, hidden.flatten(2), in_place).view(output.shape)


def _add_product(total: Tensor, left: Tensor, right: Tensor, in_place: bool) -> Tensor:
    """total + left @ right, of matrices or of batches of them."""
    if not in_place:
        return torch.addmm(total, left, right) if total.ndim == 2 else torch.baddbmm(total, left, right)
    # Autocast leaves methods that write in place alone, so the factors get the dtype of the sum here.
    left, right = left.to(total.dtype), right.to(total.dtype)
    return total.addmm_(left, right) if total.ndim == 2 else total.baddbmm_(left, right)


def _channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _rows(images: Tensor) -> Tensor:
    """View a channels-last batch as (B, P, C); the last dimension is dense, so a matrix product needs no copy."""
    return rearrange(images, "b c h w -> b (h w) c")


def _reduce(inputs: Tensor, down: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolve with the rows of ``down``; the groups of a grouped layer become images, for they share those rows."""
    stride, padding, dilation, groups = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    if geometry.padding_mode != "zeros":
        inputs, padding = F.pad(inputs, geometry.border, mode=geometry.padding_mode), (0, 0)
    if groups > 1:
        inputs = rearrange(inputs, "b (g i) h w -> (b g) i h w", g=groups)
    if down.ndim == 4:
        return F.conv2d(inputs, down, None, stride, padding, dilation)
    if groups > 1:
        down = down.repeat_interleave(groups, dim=0)
    images, ranks = down.shape[:2]
    if down.shape[-2:] == (1, 1) and stride == (1, 1) and padding in ((0, 0), "valid", "same"):
        hidden = torch.bmm(down.flatten(2), inputs.flatten(2))
        return hidden.view(images, ranks, *inputs.shape[2:])
    stacked = F.conv2d(
        inputs.reshape(1, -1, *inputs.shape[2:]), down.flatten(0, 1), None, stride, padding, dilation, images
    )
    return stacked.view(images, ranks, *stacked.shape[2:])


def _expand_groups(output: Tensor, hidden: Tensor, up: Tensor, groups: int) -> Tensor:
    """Each group reads its own hidden maps and its own columns of ``up``."""
    batch = output.shape[0]
    if up.ndim == 2:
        up = up.expand(batch, *up.shape)
    up = rearrange(up, "b r (g o) -> (b g) o r", g=groups)
    result = torch.baddbmm(rearrange(output, "b (g o) h w -> (b g) o (h w)", g=groups), up, hidden.flatten(2))
    return result.view(output.shape)
