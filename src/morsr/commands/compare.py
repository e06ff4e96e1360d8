"""`morsr compare`: which differences between two scored runs are real."""

from __future__ import annotations

from pathlib import Path


def run(a: Path, b: Path, *, method_a: str | None = None, method_b: str | None = None) -> int:
    """Compare two tables of scores per image, with paired bootstrap intervals.

    Args:
        a: table that `morsr score` wrote, or a folder of runs by seed as `make ablation` leaves it
        b: the same of run B; may be the same file
        method_a: which row of A, when it has several
        method_b: which row of B, when it has several
    """
    from morsr.evaluation.comparison import compare_tables

    print(compare_tables(a, b, method_a=method_a, method_b=method_b).to_text(), end="")
    return 0
