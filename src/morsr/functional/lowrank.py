"""Low-rank updates of linear and convolutional layers, with a gate for every image and rank.

Dimensions: B images, I input features, O output features, R ranks.
A rank is one row of ``lora_A`` and one column of ``lora_B``; for a convolution a row of ``lora_A`` is a whole kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lowrank_update(inputs: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, layer: nn.Module) -> Tensor:
    """The update of a layer's output: ``((x Aᵀ) ⊙ g) Bᵀ``, for a convolution with the layer's own geometry.

    Args:
        inputs: (B, ..., I), or (B, I, H, W) for a convolution; for B = 1 the first dimension may be missing.
        lora_A: (R, I), or (R, I, kh, kw).
        lora_B: (O, R).
        gates: (B or 1, R).
        layer: the Linear or Conv2d whose output the update is added to.

    Source: LoRA (arXiv 2106.09685); the gates as in MoR-DASR (arXiv 2511.16024).
    """
    lora_A, lora_B = lora_A.to(inputs.dtype), lora_B.to(inputs.dtype)
    if isinstance(layer, nn.Conv2d):
        hidden = F.conv2d(inputs, lora_A, None, layer.stride, layer.padding, layer.dilation)
        factors = gates.to(hidden.dtype)[:, :, None, None]
        return F.conv2d(hidden * (factors if hidden.ndim == 4 else factors[0]), lora_B[:, :, None, None])
    hidden = F.linear(inputs, lora_A)
    gates = gates.to(hidden.dtype)
    gates = gates.view(len(gates), *[1] * (hidden.ndim - 2), -1) if hidden.ndim > 1 else gates[0]
    return F.linear(hidden * gates, lora_B)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor) -> Tensor:
    """A copy of a weight (O, I) or (O, I, kh, kw) with one image's ranks added, for gates (R,).

    The sum is made in float32 (float64 for float64) and rounded once to the weight's dtype.
    """
    dtype = torch.promote_types(torch.float32, weight.dtype)
    wide = weight.movedim(1, -1)  # in the order of channels_last, in which weights and kernels of `lora_A` lie
    scaled, kernels = lora_B.to(dtype) * gates.to(dtype), lora_A.movedim(1, -1).flatten(1).to(dtype)
    sums = torch.addmm(wide.flatten(1).to(dtype), scaled, kernels)
    return sums.to(weight.dtype).view(wide.shape).movedim(-1, 1)


def routed_update(gates: Tensor, lora_A: Tensor, lora_B: Tensor, num_shared: int) -> Tensor:
    """Frobenius norm of the routed ranks' update of a weight over that of the shared ranks: (B,), NaN where that is 0.

    Args:
        gates: (B, R), shared ranks first.
        lora_A: (R, I), or (R, I, kh, kw).
        lora_B: (O, R).
        num_shared: how many ranks are shared.
    """
    kernels, columns = lora_A.flatten(1).float(), lora_B.float()
    products = (kernels @ kernels.T) * (columns.T @ columns)  # of every two ranks' updates
    routed, shared = gates.clone(), gates.clone()
    routed[:, :num_shared], shared[:, num_shared:] = 0, 0
    squares = [torch.einsum("br,rs,bs->b", part, products, part).clamp_min(0) for part in (routed, shared)]
    return (squares[0] / squares[1].where(squares[1] > 0, torch.nan)).sqrt()
