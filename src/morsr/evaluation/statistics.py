"""Means with bootstrap intervals, over photographs and over seeds.

Dimensions: S seeds, N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morsr.errors import InputError

VISIBLE = 5e-5  # half a unit of the last digit that the tables print
_AT_ONCE = 500  # resamples in memory


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval.

    Attributes:
        mean: mean of the values.
        low, high: ends of the interval.
        count: number of photographs that were resampled.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero and is visible in the fourth decimal.

        Never for a single photograph. The second condition keeps the rounding of published scores from looking like a
        difference.
        """
        visible = max(abs(self.low), abs(self.high)) >= VISIBLE
        return self.count > 1 and visible and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(
    values: np.ndarray | Sequence[float], groups: Sequence[str] | None = None, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of a sample, its interval over photographs and, where there are several, over seeds.

    Seeds and photographs are resampled independently, so that the interval covers both the luck of a training and the
    choice of the photographs. With few of either it is too narrow: five values have little spread to draw from, and the
    interval of four photographs excludes 0 without a difference one time in five.

    Args:
        values: (N,) finite numbers, for a paired comparison the differences per image, or (S, N), one row per seed.
        groups: the photograph of each image; images of one photograph are resampled together. None: each is its own.
        resamples: number of bootstrap samples.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        InputError: no values, values that are not finite, or groups of another length.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    seeds, images = values.shape
    if values.size == 0 or not np.isfinite(values).all() or (groups is not None and len(groups) != images):
        raise InputError(f"bootstrap: expected finite values with one group per image, got shape {values.shape}")
    labels = np.arange(images) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(labels).astype(np.float64)
    sums = np.stack([np.bincount(labels, weights=row) for row in values])
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        rows = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        drawn = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=count)
        means.append(((rows @ sums) * drawn).sum(1) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(sizes))


def paired_difference(
    scores: Sequence[Mapping[str, float]],
    reference: Sequence[Mapping[str, float]],
    groups: Mapping[str, str] | None = None,
) -> Interval:
    """Mean of `scores - reference` over the images that all of them have, with its interval.

    Args:
        scores: image to score, one mapping per seed.
        reference: the same of the run that is compared with, seed by seed.
        groups: image to photograph; an image without one is its own.

    Raises:
        InputError: no image with finite scores in common.
    """
    images = shared_images([*scores, *reference])
    if not images:
        raise InputError("paired comparison: no image has a score on both sides")
    values = np.array([[a[name] - b[name] for name in images] for a, b in zip(scores, reference, strict=True)])
    return bootstrap(values, [(groups or {}).get(name, name) for name in images])


def shared_images(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """Images that have a finite score in every mapping."""
    return [name for name in sorted(scores[0]) if all(math.isfinite(one.get(name, math.nan)) for one in scores)]


def mean_of(values: Iterable[float]) -> float:
    """Mean of the values that are finite; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
