"""Methods over pairs of images: run, round to 8 bits, score, compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from morsr.errors import ConfigError, InputError
from morsr.evaluation.classical import bicubic
from morsr.evaluation.images import to_tensor, to_uint8
from morsr.evaluation.meter import measured
from morsr.evaluation.pictures import side_by_side
from morsr.evaluation.published import PublishedRow
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.models.metrics import Metric, MetricSet, build_metrics
from morsr.models.scores import score_image

__all__ = ["BenchmarkReport", "ImageScore", "LazyPair", "Method", "Pair", "evaluate", "set_scores"]

Method = Callable[[Tensor], Tensor]


class Pair(Protocol):
    """A low-resolution image and its reference, both (H, W, 3) uint8.

    A pair may also have `group: str`, the same for pairs that hang together (several degradations of one photograph):
    the report then gives each interval a second time, with whole groups resampled.
    """

    @property
    def stem(self) -> str:
        """The name of the pair, one for each."""
        ...

    @property
    def lr(self) -> np.ndarray:
        """(h, w, 3) uint8."""
        ...

    @property
    def hr(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        ...


@runtime_checkable
class LazyPair(Protocol):
    """A pair that is read when its turn comes."""

    def load(self) -> Pair:
        """Read both images."""
        ...


@torch.no_grad()
def evaluate(
    methods: Mapping[str, Method],
    pairs: Iterable[Pair | LazyPair],
    metrics: Sequence[str] | MetricSet = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
    progress: bool = True,
    reference: str | None = None,
    published: Sequence[PublishedRow] = (),
    pictures: int = 4,
    device: torch.device | None = None,
) -> BenchmarkReport:
    """Score methods over pairs.

    A method gets the LR image as (1, 3, h, w) float32 in [0, 1] on the CPU and returns (1, 3, H, W) of the reference's
    size. Its output is clamped and rounded to 8 bits before anything is computed, so that the numbers are those of
    the saved file.

    Args:
        methods: name to method, in table order.
        pairs: what they are scored on; read once, one at a time.
        metrics: names, or a ready set of metrics.
        out: folder for scores.csv, scores.json, scores.md and side_by_side.png; None writes nothing.
        progress: show a progress bar.
        reference: the row that differences are taken to; None is "bicubic" when there, else the first method.
        published: rows of papers to print beside.
        pictures: how many images the side-by-side sheet shows.
        device: where learned metrics run; None is the CPU.

    Raises:
        ConfigError: no methods, an unknown reference, or unknown metrics.
        InputError: no pairs, two pairs of one name, a pair that is not 8-bit RGB, or a method that returned another
            size or values that are not finite; the message names the method and the image.
    """
    if not methods:
        raise ConfigError("evaluate: expected at least one method, got none")
    reference = reference or ("bicubic" if "bicubic" in methods else next(iter(methods)))
    if reference not in methods:
        raise ConfigError(f"evaluate: no method {reference!r} to compare with; methods: {', '.join(methods)}")
    chosen = metrics if isinstance(metrics, MetricSet) else build_metrics(metrics, device=device)
    per_image = {name: metric for name, metric in chosen.metrics.items() if metric.info.kind != "set"}
    per_set = {name: metric for name, metric in chosen.metrics.items() if metric.info.kind == "set"}
    features: dict[str, dict[str, list[Tensor]]] = {name: {} for name in per_set}
    rows: list[ImageScore] = []
    problems: list[str] = []
    sheet: list[dict[str, np.ndarray]] = []
    seen: set[str] = set()
    for item in tqdm(pairs, desc="evaluate", unit="image", disable=not progress):
        pair = item.load() if isinstance(item, LazyPair) else item
        lr, hr = _checked(pair, seen)
        truth = to_tensor(hr)
        for name, metric in per_set.items():
            features[name].setdefault("", []).append(metric(truth))
        shown = {"LR bicubic": bicubic(lr, *hr.shape[:2])} if len(sheet) < pictures else None
        for method, function in methods.items():
            with measured() as used:
                raw = function(to_tensor(lr))
            restored = _output(raw, hr, method, pair.stem)
            image = to_tensor(restored)
            scores, failed = score_image(per_image, image, truth)
            problems += [f"{method} on {pair.stem}: {text}" for text in failed]
            rows.append(
                ImageScore(
                    pair.stem, method, scores,
                    seconds=used.seconds, memory_mb=used.memory_mb, group=getattr(pair, "group", None),
                )
            )  # fmt: skip
            for name, metric in per_set.items():
                features[name].setdefault(method, []).append(metric(image))
            if shown is not None and method != "bicubic":
                shown[method] = restored
        if shown is not None:
            sheet.append({**shown, "HR": hr})
    if not rows:
        raise InputError("evaluate: expected at least one pair of images, got none")
    report = BenchmarkReport(
        rows=rows,
        metrics=[metric.info for metric in chosen.metrics.values()],
        absent=chosen.absent,
        reference=reference if len(methods) > 1 else None,
        set_scores=set_scores(per_set, features, list(methods)),
        problems=problems,
        published=published,
    )
    if out is not None:
        from PIL import Image

        report.save(out)
        if sheet:
            Image.fromarray(side_by_side(sheet)).save(Path(out) / "side_by_side.png")
    return report


def _checked(pair: Pair, seen: set[str]) -> tuple[np.ndarray, np.ndarray]:
    if pair.stem in seen:
        raise InputError(f"evaluate: two pairs are called {pair.stem!r}; expected one name for each")
    seen.add(pair.stem)
    lr, hr = np.asarray(pair.lr), np.asarray(pair.hr)
    for name, image in (("lr", lr), ("hr", hr)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise InputError(f"{pair.stem}: {name}: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    return lr, hr


def _output(raw: Tensor, hr: np.ndarray, method: str, stem: str) -> np.ndarray:
    expected = (1, 3, *hr.shape[:2])
    if tuple(raw.shape) != expected:
        raise InputError(f"{method} on {stem}: expected an output of shape {expected}, got {tuple(raw.shape)}")
    if not bool(torch.isfinite(raw).all()):
        raise InputError(f"{method} on {stem}: the output holds NaN or infinity")
    return to_uint8(raw)


def set_scores(
    metrics: Mapping[str, Metric], features: Mapping[str, Mapping[str, list[Tensor]]], methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores over the whole set from features[metric][method], where the method "" is the reference."""
    scores: dict[str, dict[str, float]] = {}
    for name, metric in metrics.items():
        truth = torch.cat(features[name].get("", [torch.empty(0, 1)]))
        for method in methods:
            found = torch.cat(features[name].get(method, [torch.empty(0, 1)]))
            enough = min(len(found), len(truth)) >= 2  # a covariance needs two samples
            scores.setdefault(method, {})[name] = metric.distance(found, truth) if enough else math.nan
    return scores
