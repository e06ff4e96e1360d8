"""`morsr severity`: degradation scores of images as a table and a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morsr.commands._common import existing, output_file, say
from morsr.errors import InputError
from morsr.files import atomic_path, printable


def run(
    input: Path,
    *,
    estimator: str = "frequency",
    weights: str | None = None,
    prompts: str | None = None,
    csv: Path | None = None,
    device: str = "auto",
) -> int:
    """Score how degraded images are, from 0 (clean) to 1 (worst); nothing is restored.

    Prints a table, most severe first. Returns 1 if some files of a folder could not be read.

    Args:
        input: image file or folder with its subfolders
        estimator: frequency, learned, clip, or the class path of an estimator of your own
        weights: learned: a .safetensors of your own; clip: local folder or hub id
        prompts: clip: a shipped prompt set (pairs, ensemble) or a YAML file
        csv: write one line per image
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        MorsrError: nothing to score, a wrong setting or missing weights, before anything is written; and for a single
            file whatever is wrong with it.
    """
    existing(input)
    if csv is not None:
        output_file(csv, "--csv", ".csv")

    from morsr.data.sources import find_images

    paths = find_images(input) if input.is_dir() else [str(input)]
    scorer, where = _estimator(estimator, weights, prompts, device)
    names, rows, failed = (*scorer.names, "severity"), [], 0
    for place in paths:
        try:
            values = _score(scorer, place, where)
        except InputError as error:
            if not input.is_dir():
                raise
            say(f"morsr: {error}")
            failed += 1
            continue
        name = str(Path(place).relative_to(input)) if input.is_dir() else Path(place).name
        rows.append((printable(name), values))
    if not rows:
        raise InputError(f"{input}: none of its {len(paths)} images can be read")

    rows.sort(key=lambda row: -row[1][-1])
    print(_table(names, rows))
    if csv is not None:
        _write_csv(csv, names, rows)
        print(printable(str(csv)))
    return 1 if failed else 0


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *names])
        writer.writerows([image, *(f"{value:.6f}" for value in values)] for image, values in rows)


def _estimator(name: str, weights: str | None, prompts: str | None, device: str) -> tuple[Any, Any]:
    from morsr.estimators import build_estimator
    from morsr.restoring.devices import resolve_device

    settings = {"model" if name == "clip" else "weights": weights, "prompts": prompts}
    settings = {key: value for key, value in settings.items() if value is not None}
    where = resolve_device(device)
    return build_estimator(name, **settings).to(where), where


def _score(estimator: Any, path: str, device: Any) -> list[float]:
    from morsr.imaging import read

    result = estimator(read(path).rgb.to(device))
    return [*result.scores[0].tolist(), float(result.severity[0])]


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    from morsr.evaluation.tables import text_table

    means = [sum(column) / len(rows) for column in zip(*(values for _, values in rows), strict=True)]
    shown = [*rows, ("mean", means)] if len(rows) > 1 else rows
    return text_table(["image", *names], [[image, *(f"{value:.3f}" for value in values)] for image, values in shown])
