"""Losses: the balance of a mixture of ranks, the hinge losses of a discriminator, the distance of deep features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def balance_loss(
    probabilities: Tensor, share: Tensor, severity_weight: Tensor | None, num_real: int, *, alpha: float = 0.01
) -> Tensor:
    """Load-balancing loss whose zero experts weigh an image by how degraded it is, summed over layers.

    Per layer N·alpha·(sum over real slots of f_i·mean_b p_bi + sum over zero slots of f_i·mean_b w_b·p_bi): severe
    images are pushed off the zero slots and light ones may use them. An even router gives alpha per layer. Averaging p
    over layers first would hide a layer that has collapsed.

    Args:
        probabilities: (L, B, N) full softmax over N slots of B images in L layers, with gradient; real experts first.
        share: (L, N) f, share of the choices that went to each slot, summing to 1; no gradient.
        severity_weight: (B,) w, twice the rank of the severity, with mean 1; None for the plain loss (w = 1).
        num_real: slots from this one on are zero experts.
        alpha: strength.

    Source: MoR-DASR (arXiv 2511.16024), degradation-aware load balancing; Switch Transformer (arXiv 2101.03961), eq. 4.
    """
    slots = probabilities.shape[-1]
    mean = probabilities.mean(1)
    if severity_weight is not None and num_real < slots:
        weighted = (probabilities[..., num_real:] * severity_weight[None, :, None].to(probabilities.dtype)).mean(1)
        mean = torch.cat([mean[..., :num_real], weighted], dim=-1)
    return (slots * alpha * (share.detach().to(mean.dtype) * mean).sum(-1)).sum()


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over scales of max(0, 1 − D(real)) + max(0, 1 + D(fake)), for logits (B, 1, h, w) of each scale.

    >>> even = [torch.zeros(1, 1, 2, 2)]
    >>> hinge_discriminator(even, even)
    tensor(2.)

    Source: Lim and Ye, "Geometric GAN" (arXiv 1705.02894), eq. 13.
    """
    terms = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """Mean over scales of −D(fake). Source: as `hinge_discriminator`, eq. 14."""
    return torch.stack([-logits.float().mean() for logits in fake]).mean()


def feature_distances(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Square distance of feature vectors of unit length, averaged over places and levels; (B,) from 0 to 4.

    LPIPS without its learned weights per channel.

    Args:
        first, second: features (B, C, h, w) of the same levels.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features" (arXiv 1801.03924), eq. 1 with w = 1.
    """
    pairs = zip(first, second, strict=True)
    units = [[F.normalize(level.float(), dim=1, eps=1e-6) for level in pair] for pair in pairs]
    return torch.stack([(one - other).square().sum(1).mean((1, 2)) for one, other in units]).mean(0)
