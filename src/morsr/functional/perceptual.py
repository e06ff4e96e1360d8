"""Distance of two images in the features of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
