"""`morsr compare`: which differences between two scored runs are real."""

from __future__ import annotations

from json import dumps as dump_json
from pathlib import Path

from jsonargparse.typing import OpenUnitInterval

from morsr.files import write_text


def run(
    a: Path,
    b: Path,
    *,
    method_a: str | None = None,
    method_b: str | None = None,
    level: OpenUnitInterval = 0.95,
    json: Path | None = None,
) -> int:
    """Compare two tables of scores per image, with paired bootstrap intervals.

    Args:
        a: table that `morsr score` wrote, or a folder of runs by seed as `make ablation` leaves it
        b: the same of run B; may be the same file
        method_a: which row of A, when it has several
        method_b: which row of B, when it has several
        level: coverage of the intervals
        json: write the comparison into this file too

    Raises:
        MorsrError: not such tables, nothing in common, or a method to choose.
    """
    from morsr.evaluation.comparison import compare_tables

    result = compare_tables(a, b, method_a=method_a, method_b=method_b, level=level)
    if json is not None:
        write_text(json, dump_json(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    print(result.to_text(), end="")
    return 0
