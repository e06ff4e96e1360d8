"""Which files become which: the images of a folder, their outputs, and what would be written over."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from morsr.errors import InputError
from morsr.models.picture_files import FORMATS, file_format

CONTACT_SHEET = "contact_sheet.png"
"""The overview that `morsr degrade` lays among its outputs: no image of a set."""

IMAGE_ENDINGS = frozenset(
    {
        ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".tga", ".gif", ".ppm", ".pgm",
        ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
    }
)  # fmt: skip
"""Endings of images that no part of this package reads, or not every one."""


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
        text = f"{source}: no images ({', '.join(sorted(FORMATS))}) in this folder"
        raise InputError("; ".join(filter(None, [text, unread_images(source)])))
    return [Job(path, target / path.relative_to(source).parent / output_name(path, format)) for path in found]


def find_images(folder: Path) -> list[Path]:
    """All images of a folder and its subfolders, sorted; see `walk_images`."""
    return sorted(map(Path, walk_images(folder, FORMATS)))


def walk_images(folder: str | os.PathLike[str], suffixes: Container[str]) -> Iterator[str]:
    """Paths with one of the suffixes (small letters) in a folder and its subfolders, in no order.

    Hidden files and folders and contact sheets are left out; links are followed but for those that lead back.
    """
    for path in _walk(folder):
        if os.path.splitext(path)[1].lower() in suffixes and os.path.basename(path) != CONTACT_SHEET:
            yield path


def unread_images(folder: str | os.PathLike[str], suffixes: Container[str] = FORMATS) -> str:
    """One line that counts the images whose suffix is not among those that are read; empty where there is none."""
    endings = (os.path.splitext(path)[1].lower() for path in _walk(folder))
    found = Counter(ending for ending in endings if ending in IMAGE_ENDINGS and ending not in suffixes)
    if not found:
        return ""
    total, counts = found.total(), ", ".join(f"{ending} {count}" for ending, count in found.most_common())
    if total == 1:
        return f"1 file has an ending that is not read and was left out ({counts})"
    return f"{total} files have endings that are not read and were left out ({counts})"


def _walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The files of a folder and its subfolders that are not hidden."""
    for parent, below, names in os.walk(folder, followlinks=True):
        below[:] = [
            name for name in below if not name.startswith(".") and not _leads_back(Path(parent, name), Path(folder))
        ]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder below `root` is a link to one that it lies in, however many links lead there."""
    if not folder.is_symlink():
        return False
    target, around = folder.resolve(), (parent for parent in folder.parents if parent.is_relative_to(root))
    return any(parent.resolve().is_relative_to(target) for parent in around)


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
