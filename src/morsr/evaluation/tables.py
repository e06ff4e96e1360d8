"""The report of an evaluation: one row per image and method, and its CSV, JSON and Markdown forms."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from morsr.errors import ConfigError, InputError
from morsr.evaluation.published import PublishedRow
from morsr.evaluation.statistics import Interval, finite, mean_of, paired_difference
from morsr.files import write_text
from morsr.models.metric_info import MetricInfo

PROTOCOL = "stablesr"
PROTOCOL_TEXT = (
    "protocol stablesr: outputs rounded to 8 bits, whole image without border crop, "
    "PSNR and SSIM on luma (BT.601, studio swing)"
)


@dataclass(frozen=True)
class ImageScore:
    """Scores of one method on one image. NaN where a metric has no value for this image.

    Attributes:
        image: name of the pair.
        method: name of the method.
        scores: metric name to value.
        seconds: wall time of the method on this image, if it ran here.
        memory_mb: its peak memory in MiB, if it ran here and could be measured.
        group: images of one group hang together (several degradations of one photograph).
    """

    image: str
    method: str
    scores: dict[str, float]
    seconds: float | None = None
    memory_mb: float | None = None
    group: str | None = None


@dataclass
class BenchmarkReport:
    """Everything an evaluation found; notes may be added before it is saved.

    Attributes:
        rows: one per image and method.
        metrics: the metrics, in column order.
        absent: metrics that could not be had, and why.
        reference: the method that differences are taken to, or None.
        set_scores: method to scores over the whole set (FID).
        problems: what was left out or failed, one text each.
        incomplete: whether an image failed while it was scored.
        published: rows quoted from papers.
        protocol: name of the protocol.
        notes: further lines for the foot of the Markdown table.
    """

    rows: Sequence[ImageScore]
    metrics: Sequence[MetricInfo]
    absent: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    set_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    problems: Sequence[str] = ()
    incomplete: bool = False
    published: Sequence[PublishedRow] = ()
    protocol: str = PROTOCOL
    notes: Sequence[str] = ()

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order in which they were evaluated."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Images in the order in which they were evaluated."""
        return tuple(dict.fromkeys(row.image for row in self.rows))

    @property
    def image_metrics(self) -> tuple[MetricInfo, ...]:
        """The metrics that score single images."""
        return tuple(info for info in self.metrics if info.kind != "set")

    def values(self, method: str, metric: str) -> dict[str, float]:
        """Image to score of one method. An unknown method or metric is a ConfigError."""
        if method not in self.methods:
            raise ConfigError(f"no method {method!r} in the report; it has {', '.join(self.methods)}")
        if metric not in {info.name for info in self.image_metrics}:
            raise ConfigError(f"no metric {metric!r} per image; the report has {[i.name for i in self.image_metrics]}")
        return {row.image: row.scores.get(metric, math.nan) for row in self.rows if row.method == method}

    def mean(self, method: str, metric: str) -> float:
        """Mean over the images that have a value; a score over the set as it is; NaN when there is none."""
        if metric in self.set_scores.get(method, {}):
            return self.set_scores[method][metric]
        return mean_of(self.values(method, metric).values())

    @cached_property
    def groups(self) -> dict[str, str]:
        """Image to group, where images hang together; empty where none is known to or every group has one image."""
        found = {row.image: row.group for row in self.rows if row.group is not None}
        return found if len(set(found.values())) < len(found) else {}

    def difference(
        self,
        method: str,
        metric: str,
        reference: str | None = None,
        *,
        level: float = 0.95,
        clustered: bool = False,
    ) -> Interval:
        """Paired difference of a method to the reference row, with its bootstrap interval.

        Args:
            method, metric: which row and column.
            reference: the row that is subtracted; None is the report's own.
            level: coverage of the interval.
            clustered: resample whole groups (the photographs) instead of images. The interval then speaks of other
                photographs, and not only of other degradations of these.

        Raises:
            ConfigError: unknown method or metric, or no reference.
            InputError: no image with finite scores of both.
        """
        reference = reference or self.reference
        if reference is None:
            raise ConfigError("the report has no reference row; name one of " + ", ".join(self.methods))
        groups = (self.groups or None) if clustered else None
        return paired_difference(
            self.values(method, metric), self.values(reference, metric), level=level, groups=groups
        )

    def to_csv(self, *, grouped: bool | None = None) -> str:
        """One line per image and method: image, method, the metrics, seconds, memory_mb, and group.

        Args:
            grouped: whether to write the group; None does where `groups` has some.
        """
        grouped = bool(self.groups) if grouped is None else grouped
        names = [info.name for info in self.image_metrics]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "method", *names, "seconds", "memory_mb", *(["group"] if grouped else [])])
        for row in self.rows:
            scores = [_number(row.scores.get(name)) for name in names]
            cells = [row.image, row.method, *scores, _number(row.seconds, 4), _number(row.memory_mb, 1)]
            writer.writerow([*cells, row.group] if grouped else cells)
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (NaN as None), as `to_json` writes it."""
        names = [info.name for info in self.metrics]
        summary = {}
        for method in self.methods:
            entry: dict[str, Any] = {"mean": {name: finite(self._mean_or_nan(method, name)) for name in names}}
            entry["seconds"] = finite(self._mean_of(method, "seconds"))
            entry["memory_mb"] = finite(self._mean_of(method, "memory_mb"))
            if self.reference and method != self.reference:
                entry[f"difference to {self.reference}"] = _plain(self._differences(method))
                if self.groups:
                    entry[f"difference to {self.reference}, by group"] = _plain(
                        self._differences(method, clustered=True)
                    )
            summary[method] = entry
        return {
            "protocol": self.protocol,
            "images": len(self.images),
            "metrics": {
                info.name: {
                    "source": info.source,
                    "range": info.range,
                    "better": "lower" if info.lower_is_better else "higher",
                }
                for info in self.metrics
            },
            "absent": dict(self.absent),
            "problems": list(self.problems),
            "summary": summary,
            "published": [vars(row) for row in self.published],
            "per_image": [{**vars(row), "scores": {k: finite(v) for k, v in row.scores.items()}} for row in self.rows],
        }

    def to_json(self) -> str:
        """Summary, definitions, what is absent, and the values per image."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Means per method, differences to the reference, published rows, and what a reader must know of them."""
        parts = [f"{len(self.images)} images, {PROTOCOL_TEXT if self.protocol == PROTOCOL else self.protocol}."]
        parts.append(self._means_table())
        if self.reference and len(self.methods) > 1 and self.image_metrics:
            parts.append(
                f"Difference to {self.reference}, per image, with paired 95 % bootstrap intervals "
                "(bold: the interval excludes zero):"
            )
            parts.append(self._differences_table())
            if self.groups:
                parts.append(
                    f"The same with the {len(set(self.groups.values()))} photographs resampled, each with all its "
                    "images (few photographs say little about others, however many images are made of them):"
                )
                parts.append(self._differences_table(clustered=True))
        if self.published:
            parts.append("Published, not computed here:")
            parts.append(self._published_table())
        if self.absent:
            parts.append("Absent:\n" + "\n".join(f"- {name}: {reason}" for name, reason in self.absent.items()))
        if self.problems:
            parts.append(
                f"Left out or without a value ({len(self.problems)}):\n"
                + "\n".join(f"- {text}" for text in self.problems)
            )
        definitions = [f"- {info.name} {info.arrow} ({info.range}): {info.source}" for info in self.metrics]
        parts.append("Metrics:\n" + "\n".join(definitions))
        parts.extend(self.notes)
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write scores.csv, scores.json and scores.md into a folder, which is made; returns their paths."""
        folder = Path(folder)
        texts = {"csv": self.to_csv(), "json": self.to_json(), "md": self.to_markdown()}
        paths = {}
        for suffix, text in texts.items():
            paths[suffix] = folder / f"scores.{suffix}"
            write_text(paths[suffix], text)
        return paths

    def _mean_or_nan(self, method: str, name: str) -> float:
        if name in {info.name for info in self.image_metrics}:
            return self.mean(method, name)
        return self.set_scores.get(method, {}).get(name, math.nan)

    def _mean_of(self, method: str, attribute: str) -> float:
        values = [getattr(row, attribute) for row in self.rows if row.method == method]
        return mean_of(value for value in values if value is not None)

    def _differences(self, method: str, *, clustered: bool = False) -> dict[str, Interval]:
        found = {}
        for info in self.image_metrics:
            try:
                found[info.name] = self.difference(method, info.name, clustered=clustered)
            except InputError:  # the two share no image with a value: the cell stays empty
                continue
        return found

    def _means_table(self) -> str:
        timed = any(row.seconds is not None for row in self.rows)
        weighed = any(row.memory_mb is not None for row in self.rows)
        head = ["method", *(f"{info.name} {info.arrow}" for info in self.metrics)]
        head += ["s/image"] * timed + ["MiB"] * weighed
        lines = []
        for method in self.methods:
            cells = [self._cell(method, info) for info in self.metrics]
            if timed:
                cells.append(_text(self._mean_of(method, "seconds"), 3))
            if weighed:
                cells.append(_text(self._mean_of(method, "memory_mb"), 0))
            lines.append([method, *cells])
        return markdown_table(head, lines)

    def _cell(self, method: str, info: MetricInfo) -> str:
        text = _text(self._mean_or_nan(method, info.name), 4)
        if info.kind == "set":
            return text
        scored = sum(math.isfinite(value) for value in self.values(method, info.name).values())
        # A mean over fewer images is not comparable with the column's others, so it says so itself.
        return text if scored in (0, len(self.images)) else f"{text} (n={scored})"

    def _differences_table(self, *, clustered: bool = False) -> str:
        head = ["method", *(f"Δ {info.name} {info.arrow}" for info in self.image_metrics)]
        lines = []
        for method in self.methods:
            if method == self.reference:
                continue
            found = self._differences(method, clustered=clustered)
            cells = [_interval_text(found.get(info.name)) for info in self.image_metrics]
            lines.append([method, *cells])
        return markdown_table(head, lines)

    def _published_table(self) -> str:
        own = [info.name for info in self.metrics]
        quoted = list(dict.fromkeys(name for row in self.published for name in row.scores))
        names = [name for name in own if name in quoted] + [name for name in quoted if name not in own]
        lines = [
            [f"{row.method} (published)", row.dataset, *(_quoted(row.scores.get(name)) for name in names), row.source]
            for row in self.published
        ]
        return markdown_table(["method", "data set", *names, "source"], lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _interval_text(value: Interval | None) -> str:
    if value is None:
        return "–"
    return f"**{value}**" if value.excludes_zero else str(value)


def _plain(values: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": value.mean, "low": value.low, "high": value.high, "count": value.count}
        for name, value in values.items()
    }


def _number(value: float | None, digits: int = 6) -> str:
    return "" if finite(value) is None else f"{value:.{digits}f}"


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _quoted(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
