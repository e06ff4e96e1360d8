"""Which files of a folder are images, and in which order they come."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NoReturn

from morsr.errors import InputError
from morsr.files import printable

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".tif": "TIFF",
    ".tiff": "TIFF", ".bmp": "BMP", ".gif": "GIF",
}  # fmt: skip
"""Suffixes of image files and Pillow's names of their formats."""

SUFFIXES = frozenset(FORMATS)
KNOWN_SUFFIXES = ", ".join(sorted(FORMATS))  # for messages


def list_images(source: str | os.PathLike[str]) -> list[Path]:
    """Image files in natural order: folder by folder, frame 2 before frame 10.

    Hidden files and folders, and what is not a regular file (pipes, devices, links to them, broken links) are left out.
    Links to folders are followed; each folder is listed once.

    Args:
        source: a folder, or one file, which is returned whatever its suffix.

    Raises:
        InputError: nothing is there, or the folder has no image.
    """
    source = Path(source)
    if not source.is_dir():
        check_regular(source)
        return [source]
    found, seen = [], set()
    for parent, below, names in os.walk(source, followlinks=True, onerror=_unreadable):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (place := os.path.realpath(parent)) in seen:
            below.clear()
            continue
        seen.add(place)
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise InputError(
            f"{printable(str(source))}: no image in this folder; expected files ending in {KNOWN_SUFFIXES}"
        )
    return sorted(found, key=natural_key)


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{printable(str(error.filename))}: cannot be read ({error.strerror})") from error


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Raise InputError for whatever is not a regular file, before anything waits for its content."""
    name = printable(os.fspath(path))
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be read ({reason})") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, device or socket"
        raise InputError(f"{name}: expected an image file, this is a {kind}")
    return found


def natural_key(path: Path) -> tuple[str, list[tuple[int, str]], str]:
    """Sorts by folder, then by name with its numbers as numbers."""
    parts = re.split(r"([0-9]+)", path.name)
    return str(path.parent), [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
