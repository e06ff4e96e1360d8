"""Hinge losses of a discriminator that judges several scales.

Every logits tensor is (B, 1, h, w), one verdict per place; scales count alike, whatever their number of places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over scales of max(0, 1 − D(real)) + max(0, 1 + D(fake)).

    >>> even = [torch.zeros(1, 1, 2, 2)]
    >>> hinge_discriminator(even, even)
    tensor(2.)

    Source: Lim and Ye, "Geometric GAN" (arXiv 1705.02894), eq. 13.
    """
    terms = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """Mean over scales of −D(fake).

    Source: Lim and Ye, "Geometric GAN" (arXiv 1705.02894), eq. 14.
    """
    return torch.stack([-logits.float().mean() for logits in fake]).mean()
