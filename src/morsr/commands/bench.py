"""`morsr bench NAME`: one measurement as a table of ratios against a named peer."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from typing import Any

import morsr.bench
from morsr.errors import ConfigError
from morsr.files import user_path, write_text

HELP = "measure as ratios against named peers; --json writes the numbers"


def names() -> list[str]:
    """The measurements there are: one module of morsr.bench each."""
    return sorted(module.name for module in pkgutil.iter_modules(morsr.bench.__path__) if module.name[0] != "_")


def table(result: dict[str, Any]) -> str:
    """Title, settings and rows of a result as Markdown; a row that lacks a column leaves it empty."""
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    lines = [result["title"], ", ".join(f"{name} {value}" for name, value in result["settings"].items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in result["rows"]]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
    if isinstance(value, (list, tuple)):
        return " to ".join(_cell(item) for item in value)
    return "" if value is None else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=names(), help="what to measure")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the result there")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the measurement; NAME --help lists them")


def run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"morsr.bench.{args.name}")
    parser = argparse.ArgumentParser(prog=f"morsr bench {args.name}", description=module.HELP)
    module.add_arguments(parser)
    # argparse hands everything after NAME to `options`, so --json may stand there too.
    parser.add_argument("--json", type=user_path, default=args.json, help=argparse.SUPPRESS)
    options = parser.parse_args(args.options)
    result: dict[str, Any] = module.run(options)
    print(table(result))
    if options.json:
        try:
            write_text(options.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {options.json} cannot be written ({error})") from error
    return 0
