"""Two rows of an experiment compared image by image: tables of scores, or folders with one run per seed."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from morsr.errors import ConfigError, InputError
from morsr.evaluation.statistics import Interval, mean_of, paired_difference, shared_images
from morsr.evaluation.tables import FACTS, BenchmarkReport, ImageScore, interval_cells, number, text_table
from morsr.files import printable
from morsr.models.metrics import ALIASES, Metric, metric_info

_STEP = re.compile(r"step_(\d+)(?:\.\d+)?\.csv")


@dataclass(frozen=True)
class Comparison:
    """The difference of run B to run A, metric by metric, over the images of both.

    Attributes:
        name_a, name_b: what the runs are called.
        rows: metric, mean of A, mean of B, interval of B - A, number of images; means over the images of both.
        seeds: number of trainings of each.
        images: number of images that some metric has in common.
        unmatched: images that only one of them has.
    """

    name_a: str
    name_b: str
    rows: Sequence[tuple[Metric, float, float, Interval, int]]
    seeds: int
    images: int
    unmatched: Sequence[str] = ()

    def to_text(self) -> str:
        """A table with one line per metric and a verdict for B."""
        lines = []
        for info, a, b, value, n in self.rows:
            label = info.label + f" (n={n})" * (n < self.images)
            lines.append([label, number(a), number(b), *interval_cells(value), verdict_of(info, value)])
        count = max(value.count for *_, value, _ in self.rows)
        photographs = f" of {count} photographs" if count < max(n for *_, n in self.rows) else ""
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        head = ["metric", "A", "B", "B - A", "95 % interval (*: without 0)", "B is"]
        text = f"A: {printable(self.name_a)}\nB: {printable(self.name_b)}\n{self.images} images{photographs}{seeds}\n\n"
        text += text_table(head, lines) + "\n"
        if self.unmatched:
            text += f"\nin one only, left out ({len(self.unmatched)}): {printable(', '.join(self.unmatched))}\n"
        return text


def compare_tables(
    a: str | Path, b: str | Path, *, method_a: str | None = None, method_b: str | None = None
) -> Comparison:
    """Compare two tables of scores per image, or two folders of runs.

    Args:
        a, b: a CSV file as `BenchmarkReport.to_csv` writes it; or a folder with a run per seed, each with
            `scores/step_*.csv`, of which the last counts. Runs of equal folder names are paired: they have seen the
            same samples. The same file may be given twice.
        method_a, method_b: which method of each; None takes the only one beside "bicubic".

    Raises:
        InputError: no such table, or no seed, image or metric in common.
        ConfigError: a method that is not there, or several to choose from.
    """
    one, two = read_runs(Path(a)), read_runs(Path(b))
    pairs = [(one[seed], two[seed]) for seed in one if seed in two]
    if len(one) == len(two) == 1:
        pairs = [(next(iter(one.values())), next(iter(two.values())))]
    if not pairs:
        raise InputError(f"no seed in common: {a} has {', '.join(one)}; {b} has {', '.join(two)}")
    name_a, name_b = _method(pairs[0][0], method_a, a, "--method-a"), _method(pairs[0][1], method_b, b, "--method-b")
    groups = {image: group for pair in pairs for report in pair for image, group in report.groups.items()}
    every = {row.image for pair in pairs for report in pair for row in report.rows if row.method in (name_a, name_b)}
    rows, common = [], set()
    for info in pairs[0][0].metrics:
        if not all(info in report.metrics for pair in pairs for report in pair):
            continue
        values_a = [run.values(name_a, info.name) for run, _ in pairs]
        values_b = [run.values(name_b, info.name) for _, run in pairs]
        if shared := shared_images([*values_a, *values_b]):
            common |= set(shared)
            mean = mean_of(values[image] for values in values_a for image in shared)
            interval = paired_difference(values_b, values_a, groups)
            rows.append((info, mean, mean + interval.mean, interval, len(shared)))
    if not rows:
        known = [", ".join(info.name for info in report.metrics) for report in pairs[0]]
        raise InputError(f"no image and metric in common: {a} has {known[0]}; {b} has {known[1]}")
    return Comparison(f"{name_a} of {a}", f"{name_b} of {b}", rows, len(pairs), len(common), sorted(every - common))


def read_runs(path: Path) -> dict[str, BenchmarkReport]:
    """Seed to table: of a CSV file, whose only seed is its name; or of a folder, which holds a run per seed.

    Raises:
        InputError: no such file, or no run in the folder has scores.
    """
    if not path.is_dir():
        return {path.stem: read_table(path)}
    runs = {}
    for run in sorted(path.iterdir()):
        steps: dict[int, list[BenchmarkReport]] = {}
        for file in sorted(run.glob("scores/step_*.csv")):
            if found := _STEP.fullmatch(file.name):
                steps.setdefault(int(found[1]), []).append(read_table(file))
        if steps:  # several files of one step are the shares of several processes
            shares = steps[max(steps)]
            runs[run.name] = BenchmarkReport([row for share in shares for row in share.rows], shares[0].metrics)
    if not runs:
        raise InputError(f"{path}: expected runs with scores/step_*.csv in it, found none; give a table or train first")
    return runs


def read_table(path: Path) -> BenchmarkReport:
    """Scores per image of a CSV file; one without a column `method` has one method, called as the file.

    Raises:
        InputError: not readable, no column `image`, two columns of one metric, or an image twice for one method.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            lines, head = list(reader), reader.fieldnames or ()
        columns = [(column, ALIASES.get(column, column)) for column in head if column not in FACTS]
        rows = [
            ImageScore(
                line["image"],
                line.get("method") or path.stem,
                {name: float(line[column] or "nan") for column, name in columns},
                line.get("group") or None,
            )
            for line in lines
        ]
    except (OSError, csv.Error, ValueError, KeyError) as error:
        raise InputError(f"{path}: expected a CSV table of numbers with a column 'image', got: {error}") from error
    names = [name for _, name in columns]
    if not rows or len(set(names)) < len(names) or len({(row.method, row.image) for row in rows}) < len(rows):
        raise InputError(f"{path}: expected images, each once per method, and each metric once; got none or one twice")
    return BenchmarkReport(rows, [_info(name) for name in names])


def verdict_of(info: Metric, value: Interval) -> str:
    """ "better", "worse", "not distinguishable"; "higher" or "lower" where the direction is not known."""
    if not value.excludes_zero:
        return "not distinguishable"
    if info.kind == "other":
        return "higher" if value.mean > 0 else "lower"
    return "better" if (value.mean < 0) == info.lower_is_better else "worse"


def _method(table: BenchmarkReport, wanted: str | None, path: str | Path, option: str) -> str:
    names = [name for name in table.methods if name != "bicubic"] or list(table.methods)
    if wanted is None and len(names) > 1:
        raise ConfigError(f"{path} has several methods, name one with {option}: {', '.join(names)}")
    if wanted is not None and wanted not in table.methods:
        raise ConfigError(f"{path} has no method {wanted!r}; it has {', '.join(table.methods)}")
    return wanted or names[0]


def _info(name: str) -> Metric:
    try:
        return metric_info(name)
    except ConfigError:
        return Metric(name, "other", False)
