"""Distance of two images in the features of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Square distance of feature vectors of unit length, averaged over places, images and levels; from 0 to 4.

    LPIPS without its learned weights per channel.

    Args:
        first, second: features (B, C, h, w) of the same levels.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features" (arXiv 1801.03924), eq. 1 with w = 1.
    """
    terms = [
        (F.normalize(a.float(), dim=1, eps=1e-6) - F.normalize(b.float(), dim=1, eps=1e-6)).square().sum(1).mean()
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(terms).mean()


def feature_distances(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """`feature_distance` of every image of a batch, (B,)."""
    pairs = list(zip(first, second, strict=True))
    return torch.stack(
        [
            feature_distance([a[i : i + 1] for a, _ in pairs], [b[i : i + 1] for _, b in pairs])
            for i in range(len(pairs[0][0]))
        ]
    )
