"""`morsr severity`: degradation scores of images as a table, a CSV file and a plot."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morsr.errors import ConfigError, InputError
from morsr.files import atomic_path

HELP = (
    "Score how degraded images are, in several dimensions from 0 (clean) to 1 (worst). Nothing is restored. Prints a "
    "table, most severe first; --csv and --plot write files."
)
_SHOWN = 40  # rows of the plot, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("input", metavar="IN", help="image file or folder (with its subfolders)")
    parser.add_argument("--estimator", default="frequency", choices=("frequency", "learned", "clip"))
    parser.add_argument("--weights", help="learned: a .safetensors of your own; clip: local folder or hub id")
    parser.add_argument("--prompts", help="clip: a shipped prompt set (pairs, ensemble) or a YAML file")
    parser.add_argument("--csv", metavar="FILE", help="write one line per image")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the scores (.png, .svg or .pdf)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")


def run(options: argparse.Namespace) -> int:
    """Score what was asked for; 1 if some files of a folder could not be read.

    Raises:
        MorsrError: nothing to score, a wrong setting or missing weights, before anything is written; and for a single
            file whatever is wrong with it.
    """
    source = Path(options.input).expanduser()
    outputs = {name: Path(value).expanduser() for name in ("csv", "plot") if (value := getattr(options, name))}
    for name, path in outputs.items():
        if not path.parent.is_dir():
            raise InputError(f"--{name} {path}: its folder does not exist")
        if path.is_dir():
            raise InputError(f"--{name} {path}: expected the name of a file, this is a folder")
    if "plot" in outputs and outputs["plot"].suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {outputs['plot']}: expected a name ending in .png, .svg or .pdf")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")

    from morsr.data.images import find_images
    from morsr.files import printable

    paths = find_images(source) if source.is_dir() else [str(source)]
    _refuse_inputs(outputs, paths)
    estimator = _estimator(options)
    names, rows, failed = (*estimator.names, "severity"), [], 0
    for place in paths:
        try:
            values = _score(estimator, place)
        except InputError as error:
            if not source.is_dir():
                raise
            print(f"morsr: {error}", file=sys.stderr)
            failed += 1
            continue
        name = str(Path(place).relative_to(source)) if source.is_dir() else Path(place).name
        rows.append((printable(name), values))
    if not rows:
        raise InputError(f"{source}: none of its {len(paths)} images can be read")

    rows.sort(key=lambda row: -row[1][-1])
    if "csv" in outputs:
        with atomic_path(outputs["csv"]) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *names])
            writer.writerows([image, *(f"{value:.6f}" for value in values)] for image, values in rows)
    if "plot" in outputs:
        _plot(outputs["plot"], names, rows)
    print(_table(names, rows))
    for path in outputs.values():
        print(path)
    return 1 if failed else 0


def _refuse_inputs(outputs: dict[str, Path], paths: Sequence[str]) -> None:
    """Raise InputError where a table or picture would be written over one of the images."""
    inputs = {Path(path).resolve() for path in paths}
    for name, path in outputs.items():
        if path.resolve() in inputs:
            raise InputError(f"--{name} {path}: would overwrite an input")


def _estimator(options: argparse.Namespace) -> Any:
    settings: dict[str, Any] = {}
    for flag, kinds in (("weights", {"learned": "weights", "clip": "model"}), ("prompts", {"clip": "prompts"})):
        value = getattr(options, flag)
        if value is None:
            continue
        if options.estimator not in kinds:
            raise ConfigError(f"--{flag} has no effect on the estimator {options.estimator!r}")
        settings[kinds[options.estimator]] = value

    from morsr.estimators import build_estimator
    from morsr.restoring.devices import resolve_device

    return build_estimator(options.estimator, **settings).to(resolve_device(options.device))


def _score(estimator: Any, path: str) -> list[float]:
    from morsr.imaging import read

    device = next(iter(estimator.buffers())).device
    result = estimator(read(path).rgb.to(device))
    return [*result.scores[0].tolist(), float(result.severity[0])]


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    first = max(len("image"), *(len(image) for image, _ in rows))
    widths = [max(len(name), 5) for name in names]
    lines = [
        "  ".join(["image".ljust(first), *(name.rjust(width) for name, width in zip(names, widths, strict=False))])
    ]
    for image, values in rows:
        lines.append(
            "  ".join(
                [
                    image.ljust(first),
                    *(f"{value:.3f}".rjust(width) for value, width in zip(values, widths, strict=False)),
                ]
            )
        )
    if len(rows) > 1:
        means = [sum(column) / len(rows) for column in zip(*(values for _, values in rows), strict=False)]
        lines.append(
            "  ".join(
                [
                    "mean".ljust(first),
                    *(f"{value:.3f}".rjust(width) for value, width in zip(means, widths, strict=False)),
                ]
            )
        )
    return "\n".join(lines)


def _plot(path: Path, names: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> None:
    from matplotlib.figure import Figure

    # evenly spaced rows of the sorted table stand for all of them
    step = max(1, -(-len(rows) // _SHOWN))
    shown = rows[::step]
    figure = Figure(figsize=(2.5 + 0.55 * len(names), 1.8 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow([values for _, values in shown], vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    title = "Degradation scores, most severe first"
    axes.set_title(title if step == 1 else f"{title} (every {step}th of {len(rows)} images)", fontsize=10)
    figure.colorbar(image, ax=axes, label="score (0 clean, 1 worst)")
    with atomic_path(path) as part:
        figure.savefig(part, dpi=150)
