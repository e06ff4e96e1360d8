"""Scores of images as numbers: one image by many metrics, and their means while a model is validated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from morsr.functional.quality import quantize_8bit
from morsr.models.metrics import Metric, build_metrics


def score_image(metrics: Mapping[str, Metric], sr: Tensor, hr: Tensor | None) -> tuple[dict[str, float], list[str]]:
    """Scores of one image (1, 3, H, W) in [0, 1] by metric name, and what went wrong.

    A metric that cannot score the image (too small, no texture) gives NaN and one line of text.
    """
    scores, problems = {}, []
    for name, metric in metrics.items():
        try:
            scores[name] = metric(sr, hr).item()
            if math.isfinite(scores[name]):
                continue
            problems.append(f"{name} has no value here (no texture to fit statistics to)")
        except Exception as error:  # pyiqa's metrics raise anything
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
        scores[name] = math.nan
    return scores, problems


class ScoreMeans(torchmetrics.Metric):
    """Means of metrics over the images of a validation, over all processes, for a training's logs.

    Images are rounded to 8 bits first, so the means are those that `morsr score` gives for the saved files.

    Args:
        names: metrics of single images, as `morsr score` knows them. Weights are not downloaded; a metric that lacks
            them is warned of once and stands in `absent` with its reason.

    Raises:
        ConfigError: an unknown name, or a name given twice.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, names: Sequence[str] = ("psnr", "ssim", "niqe")) -> None:
        super().__init__()
        built = build_metrics(names, download=False)
        self.metrics, self.absent = built.metrics, built.absent
        for name, reason in built.absent.items():
            rank_zero_warn(f"{name} will not be scored: {reason}")
        # One row per image rather than a sum: float32, which every device has, would lose digits in a sum.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, sr: Tensor, hr: Tensor, repeated: Sequence[bool] | None = None) -> None:
        """Score restored images.

        Args:
            sr, hr: (B, 3, H, W) in [0, 1], and their references of the same shape.
            repeated: which images another process counts (`repeated` of a validation batch), or None for none.
        """
        again = repeated or [False] * len(sr)
        for restored, truth, skip in zip(quantize_8bit(sr).split(1), quantize_8bit(hr).split(1), again, strict=True):
            if skip:
                continue
            scores, _ = score_image(self.metrics, restored, truth)
            self.rows.append(torch.tensor([[scores[name] for name in self.metrics]], device=sr.device))

    def compute(self) -> dict[str, float]:
        """Mean by metric over the images that have a value; metrics without any value are left out."""
        if not len(self.rows):
            return {}
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        means = rows.cpu().double().nanmean(dim=0).tolist()
        return {name: mean for name, mean in zip(self.metrics, means, strict=True) if math.isfinite(mean)}
