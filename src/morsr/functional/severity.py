"""How bad a degradation is, in one number: the noisy-or of blur, noise and JPEG, and its rank among others.

One formula serves the true labels of synthesized pairs and the scores of an estimator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("blur", "noise", "jpeg")
"""The kinds that the severity is made of. `resize` is left out: estimators read some of it in clean photographs."""
_SYNONYMS = {"compression": "jpeg"}


def kinds_of(scores: Tensor, names: Sequence[str]) -> Tensor:
    """The columns of blur, noise and JPEG (B, K) among named scores (B, D); all columns but `worst` where none
    has such a name."""
    places = [place for place, name in enumerate(names) if _SYNONYMS.get(name, name) in KINDS]
    others = [place for place, name in enumerate(names) if name != "worst"]
    return scores[:, places or others]


def noisy_or(scores: Tensor, names: Sequence[str]) -> Tensor:
    """Severity 1 - (1 - blur)(1 - noise)(1 - jpeg): one strong degradation suffices, and none hides another.

    Args:
        scores: (B, D) in [0, 1], higher is worse; the severity (B,) is too.
        names: the D names; "compression" counts as "jpeg".
    """
    return 1 - (1 - kinds_of(scores, names)).prod(dim=1)


def worst(scores: Tensor, names: Sequence[str]) -> Tensor:
    """The largest of blur, noise and JPEG (B,), among named scores (B, D)."""
    return kinds_of(scores, names).amax(dim=1)


def rank(values: Tensor, table: Tensor | None = None) -> Tensor:
    """The empirical distribution function of a sample, (B,) float32; equal values share their mean rank.

    Args:
        values: (B,).
        table: (N,) the sample, sorted, by default the values; over its own values the ranks have the mean 1/2.
    """
    table = values.sort().values if table is None else table
    table, values = table.to(values.device), values.to(table.dtype).contiguous()
    below, up_to = (torch.searchsorted(table, values, right=right) for right in (False, True))
    return (below + up_to).float() / (2 * len(table))
