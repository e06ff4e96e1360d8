"""The images of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from morsr.models.picture_files import FORMATS

CONTACT_SHEET = "contact_sheet.png"
"""The overview that `morsr degrade` lays among its outputs: no image of a set."""

IMAGE_ENDINGS = frozenset(
    {
        ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".tga", ".gif", ".ppm", ".pgm",
        ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
    }
)  # fmt: skip
"""Endings of images that no part of this package reads, or not every one."""


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
