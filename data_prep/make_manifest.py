"""Write a manifest of image folders (path, size, hash, weight), or check one.

    python data_prep/make_manifest.py train.csv LSDIR/sub FFHQ/first10k --weight 1 2
    python data_prep/make_manifest.py train.csv --check

A manifest lets training start without looking at 155,000 files, passes over images that are too small before it opens
them, and says exactly what a run was trained on. A stopped run goes on where it was (from train.csv.rows). Files that
cannot be read are left out and named, and the exit code is then 1. With --check nothing is written: files that are
missing, or differ from their size or hash, are named.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from morsr.data.images import find_images, image_size
from morsr.data.manifests import ManifestRow, file_hash, read_rows, write_manifest
from morsr.data.outputs import output_folder
from morsr.errors import InputError, MorsrError
from morsr.files import atomic_path, printable

HASH = re.compile("[0-9a-f]{32}")


def describe(path: str, *, hashed: bool) -> tuple[str, ManifestRow | str]:
    """The row of one image, or why there is none."""
    try:
        width, height = image_size(path)
        return path, ManifestRow(path, width, height, file_hash(path) if hashed else "")
    except (InputError, OSError) as error:
        return path, str(error)


def check(row: ManifestRow, *, folder: Path) -> str:
    """What is wrong with one row's file, or an empty text."""
    path = str(folder / row.path)
    _, found = describe(path, hashed=bool(row.hash))
    if isinstance(found, str):
        return found
    if row.width and (row.width, row.height) != (found.width, found.height):
        return f"{path}: {found.width}x{found.height} pixels, the manifest says {row.width}x{row.height}"
    return f"{path}: the content differs from the manifest's hash" if row.hash != found.hash else ""


def noted_rows(rows_file: Path, *, hashed: bool) -> dict[str, list[str]]:
    """The rows that an earlier run has noted whole, by path; the file then holds no others.

    Raises:
        InputError: the file is none of this script's.
    """
    if not rows_file.is_file():
        return {}
    with open(rows_file, newline="", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    try:  # a row that was cut short is the last one, and has no end of line
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except csv.Error as error:
        raise InputError(f"{rows_file}: cannot be read as rows of a manifest ({error}); remove it") from error
    known = {
        row[0]: row
        for row in rows
        if len(row) == 4
        and all(side.isdecimal() for side in row[1:3])
        and (HASH.fullmatch(row[3]) or not (hashed or row[3]))
    }
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows(known.values())
    with atomic_path(rows_file) as part:
        part.write_bytes(kept.getvalue().encode("utf-8", "surrogateescape"))
    return known


def collect(folders: Sequence[Path], weights: Sequence[float], rows_file: Path, *, hashed: bool, workers: int,
            base: Path) -> tuple[list[ManifestRow], list[str]]:  # fmt: skip
    """Rows of all images, in the order of the folders; rows that an earlier run has noted are taken from its file."""
    known = noted_rows(rows_file, hashed=hashed)
    rows: list[ManifestRow] = []
    failed: list[str] = []
    paths = [(path, weight) for folder, weight in zip(folders, weights, strict=True) for path in find_images(folder)]
    missing = list(dict.fromkeys(path for path, _ in paths if path not in known))
    with (
        ProcessPoolExecutor(workers) as pool,
        open(rows_file, "a", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        work: Iterable[tuple[str, ManifestRow | str]] = pool.map(
            partial(describe, hashed=hashed), missing, chunksize=16
        )
        for path, row in tqdm(work, total=len(missing), unit="image"):
            if isinstance(row, str):
                failed.append(row)
                continue
            known[path] = [path, str(row.width), str(row.height), row.hash]
            writer.writerow(known[path])
    for path, weight in paths:
        if path not in known:
            continue
        name = Path(os.path.relpath(path, base)).as_posix()
        if printable(name) != name:
            failed.append(f"{printable(path)}: expected a name in UTF-8, which a manifest is written in; rename it")
            continue
        _, width, height, digest = known[path]
        rows.append(ManifestRow(name, int(width), int(height), digest, weight))
    return rows, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, metavar="OUT.csv")
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--weight", type=float, nargs="+", help="one per folder: how often its images are drawn")
    parser.add_argument("--no-hash", action="store_true", help="leave the hashes out; only headers are read then")
    parser.add_argument("--check", action="store_true", help="compare the files with an existing manifest")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise InputError(f"--workers: expected at least 1, got {options.workers}")
        if options.check:
            return _check(options)
        return _make(options)
    except (MorsrError, OSError) as error:
        print(f"make_manifest: {error}", file=sys.stderr)
        return 2


def _make(options: argparse.Namespace) -> int:
    weights = options.weight or [1.0] * len(options.folders)
    if not options.folders or len(weights) != len(options.folders) or not all(0 < w < math.inf for w in weights):
        raise InputError("expected at least one folder, and as many weights above 0 as folders if any")
    if options.manifest.suffix.lower() != ".csv":
        raise InputError(f"{options.manifest}: a manifest's name ends in .csv")
    folders = [folder.resolve() for folder in options.folders]
    base = output_folder(options.manifest.resolve().parent)
    rows_file = options.manifest.with_name(options.manifest.name + ".rows")
    rows, failed = collect(folders, weights, rows_file, hashed=not options.no_hash, workers=options.workers, base=base)
    if not rows:
        raise InputError(f"none of {len(failed)} images can be read; the first: {failed[0]}")
    write_manifest(options.manifest, rows)
    rows_file.unlink()
    print(f"{options.manifest}: {len(rows)} images")
    return _named(failed)


def _check(options: argparse.Namespace) -> int:
    if options.folders:
        raise InputError("--check takes the manifest alone")
    rows = read_rows(options.manifest)
    with ProcessPoolExecutor(options.workers) as pool:
        work = pool.map(partial(check, folder=options.manifest.resolve().parent), rows, chunksize=16)
        failed = [problem for problem in tqdm(work, total=len(rows), unit="image") if problem]
    print(f"{options.manifest}: {len(rows) - len(failed)} of {len(rows)} images are as the manifest says")
    return _named(failed)


def _named(failed: Sequence[str]) -> int:
    for problem in failed:
        print(problem, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
