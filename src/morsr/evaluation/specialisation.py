"""What each slot is for: the mutual information between its being chosen and the kind of degradation.

Dimensions: I images, L layers, K chosen slots, N slots, G kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morsr.errors import InputError
from morsr.functional.utilization import mutual_information

MIN_IMAGES = 8


@dataclass(frozen=True)
class Specialisation:
    """What each slot is for, as far as the kinds of images that choose it tell.

    Attributes:
        kinds: the G kinds of degradation.
        information: (L, N) mutual information in bits between "the slot was chosen" and the kind, chance subtracted
            (Miller and Madow's term), so that slots unrelated to the kind lie around 0.
        kind: (L, N) index of the kind that chooses the slot most over its own share of images.
        lift: (L, N) how many times more often that kind chooses the slot than an average image does.
        q_value: (L, N) false discovery rate: among all slots with at most this value, the expected share of slots
            without any relation to the kind (G-test, Benjamini and Hochberg).
    """

    kinds: tuple[str, ...]
    information: Tensor
    kind: Tensor
    lift: Tensor
    q_value: Tensor

    def top(self, count: int = 20, *, kind: str | None = None) -> list[tuple[int, int]]:
        """(layer, slot) of the most informative slots at a false discovery rate of 1 %, of one kind or of all."""
        allowed = self.q_value < 0.01
        if kind is not None:
            allowed &= self.kind == self.kinds.index(kind)
        order = self.information.masked_fill(~allowed, -1).flatten().argsort(descending=True)
        kept = order[: min(count, int(allowed.sum()))]
        return [divmod(index, self.information.shape[1]) for index in kept.tolist()]


def specialise(chosen_ILK: Tensor, kinds: Sequence[str], num_slots: int) -> Specialisation:
    """Measure which slots are chosen for which kind of degradation.

    Args:
        chosen_ILK: int64 slots (I, L, K), each at most once per image and layer.
        kinds: one kind per image.
        num_slots: N.

    Raises:
        InputError: all images are of one kind, or there are fewer than 8.
    """
    from scipy.stats import false_discovery_control

    images, layers, _ = chosen_ILK.shape
    names = tuple(sorted(set(kinds)))
    if len(names) < 2 or images < MIN_IMAGES:
        raise InputError(
            f"specialisation needs at least {MIN_IMAGES} images of 2 kinds of degradation, got {images} of {len(names)}"
        )
    member = torch.tensor([[kind == name for name in names] for kind in kinds], dtype=torch.float64)
    marks = torch.zeros(images, layers, num_slots, dtype=torch.float64).scatter_(2, chosen_ILK, 1.0)
    yes = torch.einsum("iln,ig->lng", marks, member)
    sizes = member.sum(0)
    raw = mutual_information(torch.stack([yes, sizes - yes], dim=-2))
    freedom = len(names) - 1
    # Williams' correction: with a handful of choices per kind the plain G-test finds too much.
    chosen = yes.sum(-1).clamp(1, images - 1)
    williams = (
        (images / chosen + images / (images - chosen) - 1) * ((images / sizes).sum() - 1) / (6 * images * freedom)
    )
    statistic = 2 * images * math.log(2) * raw / (1 + williams)
    chance = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    average = yes.sum(-1, keepdim=True) / images
    varies = (average[..., 0] > 0) & (average[..., 0] < 1)  # a slot chosen always or never has nothing to explain
    q_value = torch.ones_like(chance)
    if varies.any():
        q_value[varies] = torch.from_numpy(false_discovery_control(chance[varies].numpy()))
    best = ((yes / sizes) / average.clamp_min(1e-12)).max(-1)
    return Specialisation(
        kinds=names,
        information=raw - varies * freedom / (2 * images * math.log(2)),
        kind=best.indices,
        lift=best.values,
        q_value=q_value,
    )
