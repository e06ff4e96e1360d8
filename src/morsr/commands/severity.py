"""`morsr severity`: degradation scores of images as a table and a CSV file."""

from __future__ import annotations

from csv import writer
from pathlib import Path

from morsr.commands._common import output_file, report_failures
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
    """
    if csv is not None:
        output_file(csv, "--csv", ".csv")

    from morsr.estimators import build_estimator
    from morsr.evaluation.tables import text_table
    from morsr.imaging import list_images, read
    from morsr.restoring.devices import resolve_device

    paths, where = list_images(input), resolve_device(device)
    settings = {"model" if estimator == "clip" else "weights": weights, "prompts": prompts}
    scorer = build_estimator(estimator, **{key: value for key, value in settings.items() if value is not None})
    scorer, rows, failed = scorer.to(where), [], []
    for path in paths:
        try:
            found = scorer(read(path).rgb.to(where))
        except InputError as error:
            failed.append(str(error))
            continue
        name = printable(str(path.relative_to(input)) if input.is_dir() else path.name)
        rows.append((name, [*found.scores[0].tolist(), float(found.severity[0])]))
    if not rows:
        raise InputError(f"{input}: none of {len(paths)} images can be read; the first: {failed[0]}")

    rows.sort(key=lambda row: -row[1][-1])
    head = ["image", *scorer.names, "severity"]
    means = [sum(column) / len(rows) for column in zip(*(values for _, values in rows), strict=True)]
    shown = [*rows, ("mean", means)] if len(rows) > 1 else rows
    print(text_table(head, [[name, *(f"{value:.3f}" for value in values)] for name, values in shown]))
    if csv is not None:
        with atomic_path(csv) as part, part.open("w", newline="", encoding="utf-8") as file:
            lines = [[name, *(f"{value:.6f}" for value in values)] for name, values in rows]
            writer(file).writerows([head, *lines])
        print(printable(str(csv)))
    return report_failures(failed)
