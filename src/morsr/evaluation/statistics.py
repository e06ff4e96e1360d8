"""Paired comparison of two runs, image by image, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from morsr.errors import InputError
from morsr.functional.quality import bootstrap_mean

VISIBLE = 5e-5  # half a unit of the last digit that the tables print


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: mean of the values.
        low, high: ends of the interval.
        count: how many values, or groups where groups were resampled.
        level: coverage, in (0, 1).
    """

    mean: float
    low: float
    high: float
    count: int
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero, and reaches further than the fourth decimal of the tables.

        Never for a single value or group, which has no interval. The second condition keeps rounding, of published
        scores for example, from looking like a difference.
        """
        visible = max(abs(self.low), abs(self.high)) >= VISIBLE
        return self.count > 1 and visible and (self.low > 0 or self.high < 0)

    def verdict(self, *, lower_is_better: bool) -> str:
        """ "better", "worse", or "not distinguishable"."""
        if not self.excludes_zero:
            return "not distinguishable"
        return "better" if (self.mean < 0) == lower_is_better else "worse"

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_of(values: Iterable[float]) -> float:
    """Mean of the values that are finite; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def finite(value: float | None) -> float | None:
    """A value as JSON has it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def paired_difference(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Interval:
    """Mean of `scores - reference` over the images that both have, with its paired bootstrap interval.

    Images whose value is not finite on either side are left out; `count` says how many remained.

    Args:
        scores: image name to score.
        reference: the same for the run that is compared with.
        level: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the resampling.
        groups: image name to group; groups are resampled whole (several degradations of one photograph).

    Raises:
        InputError: the two have no image with finite scores in common.
    """
    images = [
        name
        for name in sorted(set(scores) & set(reference))
        if math.isfinite(scores[name]) and math.isfinite(reference[name])
    ]
    if not images:
        raise InputError(
            f"paired comparison: expected images in common, got {len(scores)} and {len(reference)} images, none shared"
        )
    differences = np.array([scores[name] - reference[name] for name in images])
    labels = np.array([groups.get(name, name) for name in images]) if groups else None
    mean, low, high = bootstrap_mean(differences, level=level, resamples=resamples, seed=seed, groups=labels)
    count = len(images) if labels is None else len(set(labels))
    return Interval(mean, low, high, count, level)
