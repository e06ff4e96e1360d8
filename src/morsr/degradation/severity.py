"""How severe a degradation is: true labels of drawn parameters, one severity for labels and scores, and its rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from morsr.degradation.keys import sample_keys
from morsr.degradation.measures import DegradationMeasures, degradation_measures
from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.functional.severity import noisy_or, rank

__all__ = ["DegradationSeverity", "measure_ranks", "rank", "severity", "severity_ranks", "true_severity"]

DRAWS = 4000  # of a recipe, that ranks are taken among
REFERENCE = "realesrgan"


class DegradationSeverity(NamedTuple):
    """True labels of B images, all (B,) float32 in [0, 1], higher is worse.

    blur, noise, jpeg, resize: ranks among the draws of a recipe. combined: the noisy-or of blur, noise and jpeg.
    """

    blur: Tensor
    noise: Tensor
    jpeg: Tensor
    resize: Tensor
    combined: Tensor


def severity(given: DegradationParameters | Tensor, names: Sequence[str] = (), *, scale: int = 4) -> Tensor:
    """Severity 1 - (1 - blur)(1 - noise)(1 - jpeg) of B images, by the same formula for truth and for estimates.

    Args:
        given: drawn parameters, whose true labels are ranks among Real-ESRGAN's draws; or scores (B, D) in [0, 1].
        names: the D names of the scores.
        scale: HR pixels per LR pixel, read with parameters only.

    Returns:
        (B,) float32 in [0, 1], higher is worse.
    """
    if isinstance(given, Tensor):
        return noisy_or(given, names)
    return true_severity(given, scale=scale).combined


def severity_ranks(recipe: DegradationRecipe | str, *, scale: int = 4) -> Tensor:
    """The sorted severities (N,) of a recipe's draws, for `rank`: 2 x rank has the mean 1 over the recipe."""
    return _table(DegradationRecipe.load(recipe), scale)


def true_severity(
    parameters: DegradationParameters, recipe: DegradationRecipe | str = REFERENCE, *, scale: int = 4
) -> DegradationSeverity:
    """True labels: the rank of every measure among fixed draws of a recipe, and the severity.

    Args:
        parameters: B sets.
        recipe: the recipe to rank within.
        scale: HR pixels per LR pixel.
    """
    ranks = measure_ranks(degradation_measures(parameters, scale=scale), recipe, scale=scale)
    ranks = ranks.to(parameters.key.device)
    blur, noise, jpeg, size = ranks.unbind(dim=1)
    return DegradationSeverity(blur, noise, jpeg, size, noisy_or(ranks, DegradationMeasures._fields))


def measure_ranks(
    measures: DegradationMeasures, recipe: DegradationRecipe | str = REFERENCE, *, scale: int = 4
) -> Tensor:
    """Ranks (B, 4) of blur, noise, JPEG and resize among fixed draws of a recipe, higher is worse."""
    tables = _measure_tables(DegradationRecipe.load(recipe), scale)
    return torch.stack([rank(value, table) for value, table in zip(_harm(measures), tables, strict=True)], dim=1)


def _harm(measures: DegradationMeasures) -> tuple[Tensor, ...]:
    return measures.blur, measures.noise, -measures.jpeg, -measures.resize


def _draws(recipe: DegradationRecipe) -> DegradationParameters:
    return recipe.sample(sample_keys(0, 0, torch.arange(DRAWS)))


@functools.lru_cache(maxsize=16)
def _measure_tables(recipe: DegradationRecipe, scale: int) -> tuple[Tensor, ...]:
    measures = degradation_measures(_draws(recipe), scale=scale)
    return tuple(value.sort().values for value in _harm(measures))


@functools.lru_cache(maxsize=16)
def _table(recipe: DegradationRecipe, scale: int) -> Tensor:
    return severity(_draws(recipe), scale=scale).sort().values
