"""Lists of many image files: plain text lists, and manifests that know sizes, hashes and weights.

A manifest is a CSV file with the columns path, width, height, hash, weight (path alone is enough). Paths are relative
to the manifest's folder. 155,000 rows are read in about a second, and no image is opened before it is needed.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from morsr.data.images import SUFFIXES, ImageList
from morsr.errors import InputError
from morsr.files import atomic_path

# Names may hold blanks and several endings. What is cut off is numbers behind the last one (a size, a label, a weight),
# and what follows a comma and a blank, such as the other name of a pair.
_ENDING = "|".join(map(re.escape, sorted(SUFFIXES)))
_NAME = re.compile(rf"(.*?(?:{_ENDING}))(?:,\s.*|[,\s][\d\s.,x()\[\]]*)", re.IGNORECASE)

COLUMNS = ("path", "width", "height", "hash", "weight")


class ManifestRow(NamedTuple):
    """One image: path as written, size in pixels, BLAKE2b hash of the file (32 hexadecimal digits), weight."""

    path: str
    width: int
    height: int
    hash: str
    weight: float = 1.0


def file_hash(path: str | Path) -> str:
    """BLAKE2b of a file's bytes, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_rows(path: str | Path) -> list[ManifestRow]:
    """The rows of a manifest as written; a missing size is 0, a missing hash empty, a missing weight 1.

    Raises:
        InputError: no such file, no path column, a cell that is no number, or no row.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or ()):
                raise InputError(f"{path}: expected a header with the column path, got {rows.fieldnames}")
            unknown = set(rows.fieldnames or ()) - set(COLUMNS)
            if unknown:
                raise InputError(f"{path}: unknown columns {sorted(unknown)}; expected {', '.join(COLUMNS)}")
            found = []
            for row in rows:
                try:
                    numbers = (int(row.get("width") or 0), int(row.get("height") or 0))
                    weight = float(row.get("weight") or 1.0)
                except ValueError as error:
                    raise InputError(f"{path}, line {rows.line_num}: {error}") from error
                if not 0 <= weight < float("inf"):
                    raise InputError(f"{path}, line {rows.line_num}: expected a weight of at least 0, got {weight}")
                found.append(ManifestRow(row["path"], *numbers, row.get("hash") or "", weight))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a manifest ({error})") from error
    if not found:
        raise InputError(f"{path}: the manifest names no image")
    return found


def read_manifest(path: str | Path, *, root: str | Path | None = None) -> ImageList:
    """The images of a manifest.

    Args:
        path: the CSV file.
        root: folder that its paths are relative to; None takes the manifest's own.

    Raises:
        InputError: as `read_rows`, or all weights are 0.
    """
    rows = [row for row in read_rows(path) if row.weight > 0]
    if not rows:
        raise InputError(f"{path}: all weights are 0")
    folder = os.fspath(root if root is not None else Path(path).parent)
    return ImageList(
        tuple(os.path.join(folder, row.path) for row in rows),
        np.array([row.weight for row in rows]),
        np.array([(row.width, row.height) for row in rows], np.int64),
        (str(path),),
    )


def write_manifest(path: str | Path, rows: Iterable[ManifestRow]) -> None:
    """Write a manifest whole or not at all."""
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def read_list(path: str | Path, *, root: str | Path | None = None) -> list[str]:
    """Paths of a text list or of a meta file: one a line, relative to the list's folder or to `root`.

    Numbers behind the file name's ending are passed over: basicsr writes `0001_s001.png (480,480,3)`. Other words
    belong to the name, as in `scan.tif edited.png`, but for those behind a comma and a blank.

    Raises:
        InputError: no such file, or no path in it.
    """
    folder = os.fspath(root if root is not None else Path(path).parent)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of images ({error})") from error
    found = [os.path.join(folder, name) for name in _names(lines)]
    if not found:
        raise InputError(f"{path}: the list names no image")
    return found


def _names(lines: Iterable[str]) -> Iterator[str]:
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            named = _NAME.fullmatch(line)
            yield named[1] if named else line
