"""`morsr compare`: which differences between two scored runs are real."""

from __future__ import annotations

import argparse

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

    result = compare_tables(args.a, args.b, method_a=args.method_a, method_b=args.method_b, level=args.level)
    if args.json is not None:
        write_text(args.json, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    print(result.to_text(), end="")
    return 0
