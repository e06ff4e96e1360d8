"""Which files become which: the images of a folder, their outputs, and what would be written over."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from morsr.errors import InputError
from morsr.models.picture_files import FORMATS, file_format


class Job(NamedTuple):
    """One file to restore."""

    source: Path
    target: Path


def folder_jobs(source: Path, target: Path, format: str | None = None) -> list[Job]:
    """Image files under a folder with their outputs, which keep their subfolder and stem.

    Raises:
        InputError: the target is a file or the same folder, or there is no image.
    """
    if target.is_file():
        raise InputError(f"{target}: the input is a folder, so the output must be one too; this is a file")
    if source.resolve() == target.resolve():
        raise InputError(f"{target}: the outputs would overwrite the inputs; choose another folder")
    found = [path for path in find_images(source) if target.resolve() not in path.resolve().parents]
    if not found:
        raise InputError(f"{source}: no images ({', '.join(sorted(FORMATS))}) in this folder")
    return [Job(path, target / path.relative_to(source).parent / output_name(path, format)) for path in found]


def find_images(folder: Path) -> list[Path]:
    """All images of a folder and its subfolders, sorted; hidden ones are left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in FORMATS and path.is_file() and not _is_hidden(path.relative_to(folder))
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def output_name(source: Path, format: str | None = None) -> str:
    """The file name of an image's output: its own, or its stem with the suffix of the format."""
    return f"{source.stem}.{format.lower().lstrip('.')}" if format else source.name


def check_jobs(jobs: Sequence[Job], format: str | None = None) -> None:
    """Check all outputs before the first is made.

    Raises:
        InputError: two inputs with one output, an output that is an input, or a format that cannot be written.
    """
    seen: dict[Path, Path] = {}
    inputs = {source.resolve() for source, _ in jobs}
    for source, target in jobs:
        file_format(target, format)
        place = target.resolve()
        if place in inputs:
            raise InputError(f"{target}: this output would overwrite an input")
        if place in seen:
            remedy = "rename one, or leave out --format" if format else "rename one"
            raise InputError(f"{seen[place]} and {source} would both become {target}; {remedy}")
        seen[place] = source


def check_target(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Refuse to write over the input.

    Raises:
        InputError: both are one file.
    """
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise InputError(f"{target}: the output would overwrite the input")


def natural_order(job: Job) -> tuple[str, list[tuple[int, str]]]:
    """Sorts by folder, then by name with numbers as numbers: frame 2 before frame 10."""
    parts = re.split(r"(\d+)", job.source.name)
    return str(job.source.parent), [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
