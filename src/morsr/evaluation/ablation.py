"""What a ladder of trainings says: rows by seeds by images, with intervals over seeds and images.

Dimensions: S seeds, I images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morsr.errors import ConfigError, InputError
from morsr.evaluation.comparison import column_info, read_groups, read_scores, verdict_of
from morsr.evaluation.routing import RoutingTable, common_knowledge
from morsr.evaluation.statistics import Interval, finite, mean_of
from morsr.evaluation.tables import markdown_table
from morsr.files import write_text
from morsr.functional.quality import bootstrap_crossed
from morsr.functional.utilization import spearman

BICUBIC = "bicubic"
_STEP = re.compile(r"step_(\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Run:
    """One training of one row: scores per metric and image, and what its router did on the same images.

    Attributes:
        seed: of the training.
        scores: metric to image to score, of the trained model.
        bicubic: the same of bicubic enlargement.
        groups: image to photograph, where several images show one.
        ranks: ranks per layer that the adapter holds.
        active: ranks per layer that ran, the mean over images and layers.
        zero_share: share of the choices that fell on zero slots, the mean over images and layers; NaN without them.
        follows: Spearman correlation over images of an image's share of zero slots and its true severity; NaN where
            either does not vary.
        seconds: what the training took.
    """

    seed: int
    scores: Mapping[str, Mapping[str, float]]
    bicubic: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 0
    active: float = math.nan
    zero_share: float = math.nan
    follows: float = math.nan
    seconds: float = math.nan


def read_run(folder: str | Path, *, seed: int, ranks: int, seconds: float = math.nan) -> Run:
    """A run's newest scores and routing, as `ScoreDump` and `RoutingDump` left them.

    Args:
        folder: the run's folder.
        seed: of the training.
        ranks: ranks per layer that the adapter holds.
        seconds: what the training took.

    Raises:
        InputError: no scores in it.
    """
    folder = Path(folder)
    tables = _newest(folder / "scores", ".csv")
    if not tables:
        raise InputError(
            f"{folder}: expected scores/step_*.csv; the config needs the callback morsr.evaluation.ScoreDump"
        )
    methods: dict[str, dict[str, dict[str, float]]] = {}
    groups: dict[str, str] = {}
    for table in tables:
        groups |= read_groups(table)
        for method, scores in read_scores(table).items():
            for metric, values in scores.items():
                methods.setdefault(method, {}).setdefault(metric, {}).update(values)
    use: dict[str, float] = {"active": float(ranks)}
    routings = [RoutingTable.load(path) for path in _newest(folder / "routing", ".safetensors")]
    if routings:
        use = _routing_use(RoutingTable.concatenate(common_knowledge(routings)))
    return Run(seed, methods["morsr"], methods.get(BICUBIC, {}), groups, ranks=ranks, seconds=seconds, **use)


def _newest(folder: Path, suffix: str) -> list[Path]:
    """The files of the last step: one, or one of every process, whose images are its share."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"step_*{suffix}")):
        if match := _STEP.fullmatch(path.name.removesuffix(suffix)):
            found.setdefault(int(match[1]), []).append(path)
    return found[max(found)] if found else []


def _routing_use(table: RoutingTable) -> dict[str, float]:
    share = table.zero_share().double().mean(dim=1)
    use = {"active": float(table.active_ranks().double().mean())}
    if table.num_zero:
        use["zero_share"] = float(share.mean())
        if table.truth:
            # The combined severity: the mean of the four ranks within the recipe's reference draw.
            use["follows"] = spearman(torch.stack(list(table.truth.values())).double().mean(dim=0), share)
    return use


@dataclass(frozen=True)
class Ablation:
    """Rows of runs over the same images and seeds.

    Args:
        rows: name of the row to its runs, in table order.
        reference: the row that the others are compared with.

    Raises:
        ConfigError: an unknown reference.
        InputError: no rows, or a row without runs.
    """

    rows: Mapping[str, Sequence[Run]]
    reference: str

    def __post_init__(self) -> None:
        if not self.rows or not all(self.rows.values()):
            raise InputError(f"ablation: expected at least one finished run per row, got {_counts(self.rows)}")
        if self.reference not in self.rows:
            raise ConfigError(f"ablation: no row {self.reference!r} to compare with; rows: {', '.join(self.rows)}")

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that all runs have."""
        runs = [run for row in self.rows.values() for run in row]
        return tuple(name for name in runs[0].scores if all(name in run.scores for run in runs))

    def mean(self, row: str, metric: str) -> float:
        """Mean over images, then over seeds."""
        return float(np.mean([mean_of(run.scores[metric].values()) for run in self.rows[row]]))

    def spread(self, row: str, metric: str) -> float:
        """Standard deviation over seeds of the mean over images; NaN with one seed."""
        means = [mean_of(run.scores[metric].values()) for run in self.rows[row]]
        return float(np.std(means, ddof=1)) if len(means) > 1 else math.nan

    def difference(self, row: str, metric: str, reference: str | None = None) -> Interval:
        """Paired difference to the reference (or to "bicubic"), with its interval over seeds and photographs.

        Equal seeds are paired: they have seen the same samples in the same order. The count is that of the photographs,
        since one alone says nothing of others.

        Raises:
            InputError: no seed in common, or no image with a value.
        """
        reference = reference or self.reference
        pairs = [(run, run.bicubic) for run in self.rows[row]]
        if reference != BICUBIC:
            others = {run.seed: run.scores for run in self.rows[reference]}
            pairs = [(run, others[run.seed]) for run in self.rows[row] if run.seed in others]
        if not pairs:
            raise InputError(f"ablation: {row} and {reference} have no seed in common")
        images = [
            image
            for image in pairs[0][0].scores[metric]
            if all(math.isfinite(run.scores[metric].get(image, math.nan)) for run, _ in pairs)
            and all(math.isfinite(other[metric].get(image, math.nan)) for _, other in pairs)
        ]
        if not images:
            raise InputError(f"ablation: {row} and {reference} have no image in common with a finite {metric}")
        values = np.array([[run.scores[metric][i] - other[metric][i] for i in images] for run, other in pairs])
        groups = np.array([pairs[0][0].groups.get(image, image) for image in images])
        mean, low, high = bootstrap_crossed(values, groups=groups)
        return Interval(mean, low, high, len(set(groups.tolist())))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data; None where there is no value."""
        return {"reference": self.reference, "rows": {row: self._row_dict(row) for row in self.rows}}

    def _row_dict(self, row: str) -> dict[str, Any]:
        runs = self.rows[row]
        use = {name: _mean_over(runs, name) for name in ("ranks", "active", "zero_share", "follows", "seconds")}
        metrics = {}
        for metric in self.metrics:
            value = self._difference(row, metric)
            metrics[metric] = {
                "mean": finite(self.mean(row, metric)),
                "spread": finite(self.spread(row, metric)),
                "difference": None if value is None else {"mean": value.mean, "low": value.low, "high": value.high},
            }
        seeds = [run.seed for run in runs]
        return {"seeds": seeds, "metrics": metrics, **{name: finite(value) for name, value in use.items()}}

    def to_markdown(self) -> str:
        """Two tables: means with the router's behaviour, and differences to the reference."""
        infos = [column_info(name) for name in self.metrics]
        arrows = [
            f"{name} {info.arrow}" if info.directed else name for name, info in zip(self.metrics, infos, strict=True)
        ]
        head = ["row", "seeds", "ranks", "active ranks", *arrows, "zero share", "zero share with severity, ρ"]
        lines = []
        bicubic = next(iter(self.rows.values()))[0].bicubic
        if bicubic:
            known = [_score(mean_of(bicubic[name].values())) if name in bicubic else "" for name in self.metrics]
            lines.append([BICUBIC, "", "", "", *known, "", ""])
        for row, runs in self.rows.items():
            scores = [self._cell(row, name) for name in self.metrics]
            use = {name: _mean_over(runs, name) for name in ("active", "zero_share", "follows")}
            cells = [f"{use['active']:.2f}", *scores, _cell(use["zero_share"]), _cell(use["follows"])]
            lines.append([row, str(len(runs)), str(runs[0].ranks), *cells])
        others = [row for row in self.rows if row != self.reference]
        texts = [[row, *(self._verdict(row, metric) for metric in self.metrics)] for row in others]
        parts = [markdown_table(head, lines)]
        if texts:
            parts += [
                f"Difference to {self.reference}, with 95 % intervals over {self._resampled(others)}:",
                markdown_table(["row", *arrows], texts),
            ]
        return "\n\n".join(parts) + "\n"

    def _resampled(self, rows: Sequence[str]) -> str:
        """What the intervals of the rows go over; a single seed has no spread."""
        own = {run.seed for run in self.rows[self.reference]}
        several = {len(own.intersection(run.seed for run in self.rows[row])) > 1 for row in rows}
        if several == {True, False}:
            return "photographs, and over seeds where a row shares several with it"
        return "seeds and photographs" if True in several else "photographs"

    def _cell(self, row: str, metric: str) -> str:
        spread = self.spread(row, metric)
        return _score(self.mean(row, metric)) + (f" ± {spread:.4f}" if math.isfinite(spread) else "")

    def _verdict(self, row: str, metric: str) -> str:
        value = self._difference(row, metric)
        return "–" if value is None else f"{value}, {verdict_of(column_info(metric), value)}"

    def _difference(self, row: str, metric: str) -> Interval | None:
        try:
            return self.difference(row, metric)
        except InputError:  # no seed in common, or no image with a value
            return None

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write ablation.md and ablation.json into a folder."""
        folder = Path(folder)
        files = {"md": folder / "ablation.md", "json": folder / "ablation.json"}
        write_text(files["md"], self.to_markdown())
        write_text(files["json"], json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        return files


def _mean_over(runs: Sequence[Run], name: str) -> float:
    return mean_of(float(getattr(run, name)) for run in runs)


def _score(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _cell(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _counts(rows: Mapping[str, Sequence[Run]]) -> str:
    return ", ".join(f"{name}: {len(runs)}" for name, runs in rows.items()) or "none"
