"""Two tables of scores per image, compared pair by pair."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morsr.errors import ConfigError, InputError
from morsr.evaluation.images import SUFFIXES
from morsr.evaluation.statistics import Interval, paired_difference
from morsr.evaluation.tables import markdown_table
from morsr.models.metric_info import ALIASES, METRICS, MetricInfo
from morsr.models.metrics import metric_info

_Scores = dict[str, dict[str, float]]  # metric to image to score
_FACTS = ("image", "method", "seconds", "memory_mb", "group")  # columns that hold no scores
_AVERAGES = ("average", "avg", "mean")


@dataclass(frozen=True)
class Comparison:
    """The difference of run B to run A, metric by metric, over the images of both.

    Attributes:
        name_a, name_b: what the runs are called.
        rows: metric, mean of A, mean of B, interval of B - A; means over the common images.
        unmatched: images that only one of them has.
        clustered: metric to the interval with whole groups of images resampled, where the tables have groups.
    """

    name_a: str
    name_b: str
    rows: Sequence[tuple[MetricInfo, float, float, Interval]]
    unmatched: Sequence[str]
    clustered: Mapping[str, Interval] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """A table with one line per metric and a verdict for B."""
        lines = []
        for info, mean_a, mean_b, value in self.rows:
            verdict = verdict_of(info, value)
            verdict = verdict if verdict.startswith("not") else f"B is {verdict}"
            cells = [
                f"{info.name} {info.arrow}" if info.directed else info.name,
                f"{mean_a:.4f}",
                f"{mean_b:.4f}",
                str(value),
                str(value.count),
            ]
            if self.clustered:
                wide = self.clustered[info.name]
                cells += [f"[{wide.low:+.4f}, {wide.high:+.4f}]", str(wide.count)]
            lines.append([*cells, verdict])
        level = self.rows[0][3].level
        head = ["metric", "A", "B", f"B - A, {level:.0%} interval", "images"]
        head += ["by photograph", "photographs"] if self.clustered else []
        head.append("verdict")
        parts = [f"A: {self.name_a}\nB: {self.name_b}", markdown_table(head, lines)]
        if self.unmatched:
            parts.append(f"In one table only, left out ({len(self.unmatched)}): {', '.join(self.unmatched)}")
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        metrics = {
            info.name: {
                "a": mean_a,
                "b": mean_b,
                "difference": value.mean,
                "low": value.low,
                "high": value.high,
                "count": value.count,
                "level": value.level,
                "verdict": verdict_of(info, value),
                **self._by_group(info.name),
            }
            for info, mean_a, mean_b, value in self.rows
        }
        return {"a": self.name_a, "b": self.name_b, "metrics": metrics, "unmatched": list(self.unmatched)}

    def _by_group(self, name: str) -> dict[str, Any]:
        if name not in self.clustered:
            return {}
        value = self.clustered[name]
        return {"by_group": {"low": value.low, "high": value.high, "count": value.count}}


def compare_tables(
    a: str | Path,
    b: str | Path,
    *,
    method_a: str | None = None,
    method_b: str | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two tables of scores per image.

    Args:
        a, b: CSV files as `BenchmarkReport.to_csv` writes them, or published ones with an `image` column and one
            column per metric; see `read_scores`. The same file may be given twice with two methods.
        method_a, method_b: which method of each file; None takes the only one beside "bicubic".
        level: coverage of the intervals.
        seed: of the resampling.

    Raises:
        InputError: a file that is no such table, or no image or metric in common.
        ConfigError: a method that the file does not have, or several to choose from.
    """
    name_a, scores_a = _choose(Path(a), method_a, "--method-a")
    name_b, scores_b = _choose(Path(b), method_b, "--method-b")
    shared = [name for name in scores_a if name in scores_b]
    if not shared:
        raise InputError(f"no metric in common: {a} has {sorted(scores_a)}, {b} has {sorted(scores_b)}")
    groups = {**read_groups(Path(a)), **read_groups(Path(b))}
    rows, clustered = [], {}
    for name in shared:
        one, two = scores_a[name], scores_b[name]
        images = [image for image in one if image in two and math.isfinite(one[image] + two[image])]
        if not images:
            continue
        interval = paired_difference(two, one, level=level, seed=seed)
        mean_a, mean_b = (math.fsum(side[image] for image in images) / len(images) for side in (one, two))
        info = column_info(name)
        rows.append((info, mean_a, mean_b, interval))
        if groups:
            clustered[info.name] = paired_difference(two, one, level=level, seed=seed, groups=groups)
    if not rows:
        raise InputError(f"no image in common with a score on both sides: {a} and {b}")
    images_a, images_b = (set().union(*scores.values()) for scores in (scores_a, scores_b))
    return Comparison(f"{name_a} of {a}", f"{name_b} of {b}", rows, sorted(images_a ^ images_b), clustered)


def read_scores(path: Path) -> dict[str, _Scores]:
    """Method to metric to image to score, of a CSV file; a table without a `method` column has one, its file name.

    Columns of text, and lines that hold the average of the others, are no scores.

    Raises:
        InputError: not readable, no `image` column, a metric that has text for a number, a metric in two columns, or an
            image twice for one method.
    """
    head, lines = _read(path)
    columns, names = _metric_columns(path, head, lines), _image_names(lines)
    methods: dict[str, _Scores] = {}
    for number, line in enumerate(lines, start=2):
        if _is_average(line):
            continue
        image = names[line["image"] or ""]
        method = methods.setdefault(line.get("method") or path.stem, {})
        for column, name in columns.items():
            text = line[column]
            scores = method.setdefault(name, {})
            if image in scores:
                raise InputError(f"{path}, line {number}: {image} stands twice for one method")
            try:
                scores[image] = float(text) if text else math.nan
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}, line {number}: expected a number for {column}, got {text!r}") from error
    if not methods:
        raise InputError(f"{path}: expected a line for at least one image, got averages only")
    return methods


def _read(path: Path) -> tuple[Sequence[str], list[dict[str, str | None]]]:
    """Head and lines of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            lines: list[dict[str, str | None]] = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    if not lines or "image" not in lines[0]:
        raise InputError(f"{path}: expected a CSV table with a column 'image' and at least one line")
    return reader.fieldnames or (), lines


def _metric_columns(path: Path, head: Sequence[str], lines: Sequence[Mapping[str, str | None]]) -> dict[str, str]:
    """Column to metric, of the columns that hold scores."""
    columns: dict[str, str] = {}
    owners: dict[str, str] = {}
    for column in head:
        name = ALIASES.get(column.strip().lower(), column.strip().lower())
        if name in ("", *_FACTS) or (name not in METRICS and _is_text([line[column] for line in lines])):
            continue
        if name in owners:
            raise InputError(
                f"{path}: expected one column per metric, got {owners[name]!r} and {column!r}, which are both {name}; "
                "remove or rename one"
            )
        owners[name], columns[column] = column, name
    return columns


def _is_text(cells: Sequence[str | None]) -> bool:
    """Whether there is something in the cells, and none of it is a number."""
    filled = [cell for cell in cells if cell]
    for cell in filled:
        try:
            float(cell)
        except ValueError:
            continue
        return False
    return bool(filled)


def _is_average(line: Mapping[str, str | None]) -> bool:
    """Whether a line of a published table sums up the others. The tables written here have no such line."""
    return not _is_own(line) and (line["image"] or "").strip().lower() in _AVERAGES


def _is_own(line: Mapping[str, str | None]) -> bool:
    """Whether a line is of a table that was written here."""
    return "memory_mb" in line


def read_groups(path: Path) -> dict[str, str]:
    """Image to group of a table that has such a column; empty for others.

    Raises:
        InputError: not readable, or no `image` column.
    """
    _, lines = _read(path)
    names = _image_names(lines)
    return {
        names[line["image"] or ""]: group for line in lines if (group := line.get("group")) and not _is_average(line)
    }


def _image_names(lines: Sequence[Mapping[str, str | None]]) -> dict[str, str]:
    """What the images of a table are called in every table: without the suffix of their files.

    Tables of others may name whole paths, whose folders are left out too. Where a table needs one of these to tell two
    images apart, both keep it.
    """

    def bare(name: str) -> str:
        return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name

    written = [line["image"] or "" for line in lines]
    named = {name: name if _is_own(lines[0]) or bare(name) == name else Path(name).name for name in written}
    named = {name: bare(short) for name, short in named.items()}
    for longer in (bare, str):
        often = Counter(named.values())
        named = {name: longer(name) if often[short] > 1 else short for name, short in named.items()}
    return named


def _choose(path: Path, method: str | None, option: str) -> tuple[str, _Scores]:
    methods = read_scores(path)
    if method is None:
        candidates = [name for name in methods if name != "bicubic"] or list(methods)
        if len(candidates) > 1:
            raise ConfigError(f"{path} has several methods, name one with {option}: {', '.join(candidates)}")
        method = candidates[0]
    if method not in methods:
        raise ConfigError(f"{path} has no method {method!r}; it has {', '.join(methods)}")
    return method, methods[method]


def column_info(name: str) -> MetricInfo:
    """What a column of a table is; one that is no metric has no direction."""
    try:
        return metric_info(name)
    except ConfigError:
        return MetricInfo(name, "other", False, "not stated", "a column of the tables, whose direction nobody states")


def verdict_of(info: MetricInfo, value: Interval) -> str:
    """ "better", "worse", "not distinguishable"; just "higher" or "lower" where nobody knows the direction."""
    if not info.directed and value.excludes_zero:
        return "higher" if value.mean > 0 else "lower"
    return value.verdict(lower_is_better=info.lower_is_better)
