"""Degradation scores from spectrum, block and edge statistics: no weights, only calibrated constants."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from morsr.estimators.base import DegradationEstimator
from morsr.estimators.statistics import STATISTICS, Planes, color_planes, contrast, image_statistics
from morsr.estimators.views import CROP, bounded_view, mean_over_crops, pad_to_smallest


class FrequencyEstimator(DegradationEstimator):
    """Scores from image statistics, taken on the LR image itself, where JPEG's grid still has 8 pixels.

    Dimensions: 4 radial band shares and their low-to-high ratio (oriented so that lost detail scores high), `block`
    (8-pixel block gradients), and the composites `blur`, `noise`, `jpeg`, `resize` and `overall`. A dimension is a
    fixed linear map of clipped statistics (for the composites also of their squares and some products), and a monotone
    curve onto [0, 1], both measured once on degraded photographs: constants of the code, no weights.

    Images above 128 pixels are looked at through at most 9 crops at native resolution; their contrast is that of an
    anti-aliased view of the whole, since a single crop may be all sky.

    Source: extends the frequency features of FreqOrtho-SR; the paper itself uses CLIP.
    """

    low: Tensor
    high: Tensor
    pairs: Tensor
    weights: Tensor
    knots: Tensor

    def __init__(self, *, worst: bool = False) -> None:
        # reach of every statistic, and per dimension its weights and monotone curve
        calibration: dict[str, Any] = json.loads(
            resources.files("morsr.estimators").joinpath("frequency_calibration.json").read_text(encoding="utf-8")
        )
        super().__init__(calibration["dimensions"], worst=worst)
        self.statistics: tuple[str, ...] = tuple(calibration["statistics"])
        rows = list(calibration["dimensions"].values())
        count, pairs = len(self.statistics), len(calibration["pairs"])
        weights = torch.zeros(len(rows), 2 * count + pairs * (pairs - 1) // 2)
        for place, row in enumerate(rows):
            for term, value in row["weights"].items():
                weights[place, int(term)] = value
        # constants of the code, not weights: they stay out of checkpoints
        for name, value in {
            "low": torch.tensor(calibration["low"]),
            "high": torch.tensor(calibration["high"]),
            "pairs": torch.tensor(calibration["pairs"]),
            "weights": weights,
            "knots": torch.tensor([row["knots"] for row in rows]),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def _of_crops(self, crops: Tensor) -> Tensor:
        return image_statistics(Planes.of(crops))[:, [STATISTICS.index(name) for name in self.statistics]]

    def estimate(self, lr: Tensor) -> Tensor:
        padded = pad_to_smallest(lr)
        values = mean_over_crops(self._of_crops, padded)
        if max(padded.shape[-2:]) > CROP:
            values[:, self.statistics.index("contrast")] = contrast(color_planes(bounded_view(padded))[:, 3])
        low, high = self.low.float(), self.high.float()
        unit = ((values - low) / (high - low)).clamp(0, 1) * 2 - 1
        paired, count = unit[:, self.pairs], len(self.pairs)
        first, second = torch.triu_indices(count, count, offset=1, device=unit.device)
        terms = torch.cat([unit, unit.square(), paired[:, first] * paired[:, second]], dim=1)
        # summed row by row: a matrix product could round an image differently with other batch mates
        linear = (terms[:, None, :] * self.weights.float()).sum(dim=-1)
        # a monotone curve through (knots[d, j], j / (J - 1)), flat outside
        low, high = self.knots[:, :-1].float(), self.knots[:, 1:].float()
        return ((linear[..., None] - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).mean(dim=-1)
