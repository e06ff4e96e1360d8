"""How evenly a mixture of ranks uses its slots: load, entropy, dead experts, zero slots, all from one routing.

Dimensions: L layers, B images, K chosen slots, N slots of the gate (the real experts first, then the zero experts).
A load is a share of choices: it sums to 1 over N, and 1/N is even.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from morsr.functional.severity import rank

DEAD_BELOW = 0.1  # of the even load 1/N


def load_share(counts_LN: Tensor) -> Tensor:
    """Shares (L, N) of the choices that went to each slot, from their counts; a layer without choices gets zeros."""
    return counts_LN / counts_LN.sum(-1, keepdim=True).clamp_min(1)


def load_entropy(load_LN: Tensor) -> Tensor:
    """Shannon entropy (L,) of the load over log N: 1 is even, 0 is one slot for all."""
    entropy = torch.special.entr(load_LN).sum(-1)
    slots = load_LN.shape[-1]
    return entropy / math.log(slots) if slots > 1 else torch.ones_like(entropy)


def dead_experts(load_LN: Tensor, num_zero: int) -> Tensor:
    """Which real experts (L, N - num_zero) carry less than a tenth of the even load."""
    slots = load_LN.shape[-1]
    return load_LN[:, : slots - num_zero] < DEAD_BELOW / slots


def zero_share(chosen_LBK: Tensor, num_real: int) -> Tensor:
    """Share (L, B) of an image's k places that went to zero experts, the slots from `num_real` on; in [0, 1]."""
    return (chosen_LBK >= num_real).float().mean(-1)


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two vectors (I,), ties by their mean rank; NaN where either is constant or I < 3.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0])), 6)
    0.5
    """
    if len(first) < 3:
        return math.nan
    ranks = torch.stack([rank(first), rank(second)]).double()
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1).prod().item()
    return (centred[0] @ centred[1]).item() / norms if norms > 0 else math.nan


def mutual_information(joint: Tensor) -> Tensor:
    """Mutual information in bits of the tables (..., X, Y) of counts; zero tables give 0."""
    joint = joint.double()
    total = joint.sum((-2, -1), keepdim=True).clamp_min(1e-300)
    p = joint / total
    rows, columns = p.sum(-1), p.sum(-2)
    entropies = torch.special.entr(rows).sum(-1) + torch.special.entr(columns).sum(-1)
    return ((entropies - torch.special.entr(p).sum((-2, -1))) / math.log(2)).clamp_min(0)
