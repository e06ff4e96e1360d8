"""Scores of images as a table: means and paired differences for readers, CSV for everything else."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from morsr.errors import ConfigError, InputError
from morsr.evaluation.statistics import Interval, mean_of, paired_difference
from morsr.files import printable, write_text
from morsr.models.metrics import Metric

PROTOCOL = (
    "protocol stablesr: outputs rounded to 8 bits, whole image without border crop, "
    "PSNR and SSIM on luma (BT.601, studio swing)"
)
FACTS = ("image", "method", "seconds", "group")  # columns of a CSV file that hold no scores; seconds in older ones


@dataclass(frozen=True)
class ImageScore:
    """Scores of one method on one image. NaN where a metric has no value for this image.

    Attributes:
        image: name of the pair.
        method: name of the method.
        scores: metric name to value.
        group: the photograph, where several images show the same one.
    """

    image: str
    method: str
    scores: Mapping[str, float]
    group: str | None = None


def published_rows(dataset: str) -> dict[str, dict[str, float]]:
    """Scores of papers by method for one data set, by its name in any case ("realsr"): quoted, never computed here.

    Raises:
        ConfigError: no rows for that name; the message lists the names.
    """
    tables = json.loads(files("morsr.evaluation").joinpath("published.json").read_text(encoding="utf-8"))["tables"]
    rows = {
        row["method"]: row["scores"]
        for table in tables
        if table["dataset"].lower() == dataset.strip().lower()
        for row in table["rows"]
    }
    if not rows:
        known = dict.fromkeys(table["dataset"] for table in tables)
        raise ConfigError(f"no published rows for {dataset!r}; expected one of {', '.join(known)}")
    return rows


@dataclass
class BenchmarkReport:
    """Everything an evaluation found.

    Attributes:
        rows: one per image and method.
        metrics: in column order.
        absent: metrics that could not be computed, and why.
        reference: the method that differences are taken to, or None.
        problems: what was left out or failed, one text each.
    """

    rows: Sequence[ImageScore]
    metrics: Sequence[Metric]
    absent: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    problems: Sequence[str] = ()

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order in which they were evaluated."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Images in the order in which they were evaluated."""
        return tuple(dict.fromkeys(row.image for row in self.rows))

    @cached_property
    def groups(self) -> dict[str, str]:
        """Image to photograph, where that is known."""
        return {row.image: row.group for row in self.rows if row.group is not None}

    def values(self, method: str, metric: str) -> dict[str, float]:
        """Image to score of one method.

        Raises:
            ConfigError: unknown method or metric.
        """
        names = [info.name for info in self.metrics]
        if method not in self.methods or metric not in names:
            known = ", ".join([*self.methods, *names])
            raise ConfigError(f"expected a method and a metric of the report ({known}), got {method}, {metric}")
        return {row.image: row.scores.get(metric, math.nan) for row in self.rows if row.method == method}

    def mean(self, method: str, metric: str) -> float:
        """Mean over the images that have a value; NaN when there is none."""
        return mean_of(self.values(method, metric).values())

    def difference(self, method: str, metric: str, reference: str | None = None) -> Interval:
        """Paired difference of a method to the reference row (None: the report's), whole photographs resampled.

        Raises:
            ConfigError: unknown method or metric, or no reference.
            InputError: no image with finite scores of both.
        """
        other = self.values(str(reference or self.reference), metric)
        return paired_difference([self.values(method, metric)], [other], self.groups)

    def to_csv(self) -> str:
        """One line per image and method: image, method, the metrics, group."""
        names = [info.name for info in self.metrics]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "method", *names, "group"])
        for row in self.rows:
            numbers = [row.scores.get(name, math.nan) for name in names]
            cells = [f"{number:.6f}" if math.isfinite(number) else "" for number in numbers]
            writer.writerow([row.image, row.method, *cells, row.group or ""])
        return stream.getvalue()

    def to_text(self) -> str:
        """One table, a line per metric and method: mean, and difference to the reference with its 95 % interval."""
        delta = f"Δ to {self.reference}" if self.reference else ""
        lines = []
        for info in self.metrics:
            for method in self.methods:
                value = self._difference(method, info.name) if method != self.reference else None
                known = sum(math.isfinite(score) for score in self.values(method, info.name).values())
                # A mean over fewer images is not comparable with the others of its metric.
                count = "" if known in (0, len(self.images)) else f" (n={known})"
                lines.append([info.label, method, number(self.mean(method, info.name)) + count, *interval_cells(value)])
        head = ["metric", "method", "mean", delta, "95 % interval (*: without 0)"]
        shown = text_table(head, lines)
        notes = [printable(f"{name} is absent: {reason}") for name, reason in self.absent.items()]
        notes += [printable(f"left out or without a value: {text}") for text in self.problems]
        photographs = len(set(self.groups.values()))
        counted = f"{len(self.images)} images" + (f" of {photographs} photographs" if photographs else "")
        return "\n".join([f"{counted}, {PROTOCOL}\n", shown, *([""] if notes else []), *notes]) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write scores.csv and scores.txt into a folder, which is made."""
        write_text(Path(folder) / "scores.csv", self.to_csv())
        write_text(Path(folder) / "scores.txt", self.to_text())

    def _difference(self, method: str, metric: str) -> Interval | None:
        try:
            return self.difference(method, metric) if self.reference else None
        except InputError:  # no image with a value of both
            return None


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns, aligned by spaces; a repeated first cell is left out."""
    cells = [[printable(str(cell)) for cell in line] for line in (head, *lines)]
    firsts = [line[0] for line in cells]
    for above, line in zip(firsts, cells[1:], strict=False):
        line[0] = "" if line[0] == above else line[0]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:]])


def number(value: float, digits: int = 4) -> str:
    """A number for a table, a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def interval_cells(value: Interval | None) -> tuple[str, str]:
    """Mean and interval for a table; a star marks an interval that excludes zero."""
    if value is None:
        return "", ""
    star = " *" if value.excludes_zero else ""
    return f"{value.mean:+.4f}", f"[{value.low:+.4f}, {value.high:+.4f}]{star}"
