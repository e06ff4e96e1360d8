"""Running sums of the routing between two logs, kept on the device and copied to the host as one tensor.

Dimensions: L layers, B images, K chosen slots, N slots, D degradation scores, W last images, I images seen at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from morsr.functional.utilization import zero_share


@dataclass(frozen=True, kw_only=True)
class WindowSums:
    """What a window has seen, over all processes, on the host in float64.

    Attributes:
        counts, probability, weighted: (L, N) choices, sum of the full softmax, and that sum weighted by severity.
        images: how many images.
        severity_sum: sum of their severities.
        scores, squares: (D,) sums of the scores and of their squares.
        severity: (I,) of the last images, at most W of each process.
        zero_share: (I, L) their shares of zero slots.
    """

    counts: Tensor
    probability: Tensor
    weighted: Tensor
    images: int
    severity_sum: float
    scores: Tensor
    squares: Tensor
    severity: Tensor
    zero_share: Tensor

    def joined(self, earlier: WindowSums) -> WindowSums:
        """Both windows as one; the last images are this one's, which include the earlier one's already."""
        names = ("counts", "probability", "weighted", "images", "severity_sum", "scores", "squares")
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in names})


class RoutingWindow:
    """Adds up routings on their device without ever waiting for it.

    Args:
        layers, slots, scores: L, N and D.
        last: W, the last images whose severity and shares of zero slots are kept.
        num_real: slots that are real experts.
        device: where the routings are.
    """

    def __init__(self, *, layers: int, slots: int, scores: int, last: int, num_real: int, device: torch.device) -> None:
        self.last, self.num_real = last, num_real
        self.images = self._position = 0
        self._shapes = [(3, layers, slots), (2,), (2, scores), (last, 1 + layers)]
        self._sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self._flat = torch.zeros(sum(self._sizes), device=device)
        (self._counts, self._probability, self._weighted), self._totals, self._scores, self._ring = self._views(
            self._flat
        )
        self._ring.fill_(torch.nan)

    @torch.no_grad()
    def add(self, routing: Any, scores: Tensor, severity: Tensor) -> None:
        """Add one batch.

        Args:
            routing: with `chosen` (L, B, K) and `probabilities` (L, B, N).
            scores: (B, D).
            severity: (B,).
        """
        probabilities, severity = routing.probabilities.detach().float(), severity.detach().float()
        scores = scores.detach().float()
        chosen = routing.chosen.flatten(1)
        self._counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
        self._probability += probabilities.sum(1)
        self._weighted += torch.einsum("lbn,b->ln", probabilities, severity)
        self._totals[1] += severity.sum()
        self._scores += torch.stack([scores.sum(0), scores.square().sum(0)])
        self.images += len(severity)
        kept = min(len(severity), self.last)
        if self._position + kept > self.last:
            self._position = 0
        shares = zero_share(routing.chosen, self.num_real).T
        rows = torch.cat([severity[:, None], shares], dim=1)
        self._ring[self._position : self._position + kept] = rows[-kept:]
        self._position += kept

    def take(self, trainer: L.Trainer) -> WindowSums:
        """Sums of all processes since the last call, by one gather and one copy; every process must call this."""
        self._totals[0] = self.images
        gathered = trainer.strategy.all_gather(self._flat) if trainer.world_size > 1 else self._flat
        host = gathered.reshape(-1, self._flat.numel()).cpu().double()
        self._flat[: -self._sizes[-1]].zero_()
        self.images = 0
        sums, totals, scores, _ = self._views(host.sum(0))
        ring = torch.cat([self._views(process)[-1] for process in host])
        ring = ring[~ring[:, 0].isnan()]
        return WindowSums(
            counts=sums[0],
            probability=sums[1],
            weighted=sums[2],
            images=int(totals[0].item()),
            severity_sum=totals[1].item(),
            scores=scores[0],
            squares=scores[1],
            severity=ring[:, 0],
            zero_share=ring[:, 1:],
        )

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]
