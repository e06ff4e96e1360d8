"""The degradation-aware balance loss.

Dimensions: L layers, B images, N slots, the real experts first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(
    probabilities: Tensor,
    share: Tensor,
    severity_weight: Tensor | None,
    num_real: int,
    *,
    alpha: float = 0.01,
    reduction: str = "sum",
) -> Tensor:
    """Load-balancing loss whose zero experts weigh an image by how degraded it is.

    Per layer N·alpha·(sum over real slots of f_i·mean_b p_bi + sum over zero slots of f_i·mean_b w_b·p_bi): severe
    images are pushed off the zero slots and light ones may use them. An even router gives alpha per layer.

    Args:
        probabilities: (L, B, N) full softmax of the current batch, with gradient.
        share: (L, N) f, share of the choices that went to each slot, summing to 1; no gradient.
        severity_weight: (B,) w, twice the rank of the severity, with mean 1; None for the plain loss (w = 1).
        num_real: slots from this one on are zero experts.
        alpha: strength.
        reduction: "sum" or "mean" over layers. Averaging p over layers first would hide a layer that has collapsed.

    Source: MoR-DASR (arXiv 2511.16024), degradation-aware load balancing; Switch Transformer (arXiv 2101.03961), eq. 4.
    """
    slots = probabilities.shape[-1]
    mean = probabilities.mean(1)
    if severity_weight is not None and num_real < slots:
        weighted = (probabilities[..., num_real:] * severity_weight[None, :, None].to(probabilities.dtype)).mean(1)
        mean = torch.cat([mean[..., :num_real], weighted], dim=-1)
    per_layer = slots * alpha * (share.detach().to(mean.dtype) * mean).sum(-1)
    return per_layer.sum() if reduction == "sum" else per_layer.mean()
