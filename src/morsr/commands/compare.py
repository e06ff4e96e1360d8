"""`morsr compare`: which differences between two scored runs are real."""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from morsr.errors import InputError
from morsr.files import user_path, write_text

HELP = "compare two tables of scores per image, with paired bootstrap intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", type=user_path, metavar="A", help="table of `morsr score`, or a folder of runs by seed")
    parser.add_argument("b", type=user_path, metavar="B", help="the same of run B; may be the same file")
    parser.add_argument("--method-a", metavar="NAME", help="which row of A, when it has several")
    parser.add_argument("--method-b", metavar="NAME", help="which row of B, when it has several")
    parser.add_argument("--level", type=float, default=0.95, help="coverage of the intervals (default: %(default)s)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the comparison here too")


def run(args: argparse.Namespace) -> int:
    """Print the table of differences."""
    import json

    from morsr.evaluation.comparison import compare_tables

    with tempfile.TemporaryDirectory() as scratch:
        a, b = (
            seeds_table(path, Path(scratch, side)) if path.is_dir() else path
            for path, side in ((args.a, "a"), (args.b, "b"))
        )
        result = compare_tables(a, b, method_a=args.method_a, method_b=args.method_b, level=args.level)
    if args.json is not None:
        write_text(args.json, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    print(result.to_markdown().replace(f"{scratch}/", ""), end="")
    return 0


def seeds_table(folder: Path, target: Path) -> Path:
    """Join the last tables of scores of the runs in a folder; whole photographs are resampled over all seeds.

    Args:
        folder: holds one run per seed, each with `scores/step_*.csv`.
        target: folder for the joined table.

    Raises:
        InputError: no run in it has scores.
    """
    lines: list[dict[str, str]] = []
    for scores in sorted(folder.glob("*/scores")):
        with max(scores.glob("step_*.csv")).open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                group = line.get("group") or line["image"]
                lines.append({**line, "image": f"{scores.parent.name}/{line['image']}", "group": group})
    if not lines:
        raise InputError(
            f"{folder}: expected runs with scores/step_*.csv in it, found none; give a table or train first"
        )
    target.mkdir(parents=True)
    path = target / f"{folder.name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path
