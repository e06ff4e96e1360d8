"""How severe a degradation is: the true labels of drawn parameters."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from morsr.degradation.keys import sample_keys
from morsr.degradation.measures import DegradationMeasures, degradation_measures
from morsr.degradation.parameters import DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.functional.severity import noisy_or, rank

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


def true_severity(
    parameters: DegradationParameters, recipe: DegradationRecipe | str = REFERENCE, *, scale: int = 4
) -> DegradationSeverity:
    """True labels of B sets: the rank of every measure among fixed draws of a recipe, and the severity."""
    harms = _harm(degradation_measures(parameters, scale=scale))
    recipe = DegradationRecipe.load(recipe)
    measured = _measure_tables if isinstance(recipe, Hashable) else _measure_tables.__wrapped__
    tables = measured(recipe, scale)
    ranks = torch.stack([rank(value, table) for value, table in zip(harms, tables, strict=True)], dim=1)
    ranks = ranks.to(parameters.key.device)
    blur, noise, jpeg, size = ranks.unbind(dim=1)
    return DegradationSeverity(blur, noise, jpeg, size, noisy_or(ranks, DegradationMeasures._fields))


def _harm(measures: DegradationMeasures) -> tuple[Tensor, ...]:
    return measures.blur, measures.noise, -measures.jpeg, -measures.resize


@functools.lru_cache(maxsize=16)
def _measure_tables(recipe: DegradationRecipe, scale: int) -> tuple[Tensor, ...]:
    drawn = recipe.sample(sample_keys(0, 0, torch.arange(DRAWS)))
    measures = degradation_measures(drawn, scale=scale)
    return tuple(value.sort().values for value in _harm(measures))
