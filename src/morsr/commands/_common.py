"""Types and small things that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from morsr.errors import InputError
from morsr.files import say

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def report_failures(failed: Iterable[str]) -> int:
    """Print what failed, a line each, and return the exit code of the command."""
    lines = sorted(failed)
    for line in [f"{len(lines)} failed:", *(f"  {line}" for line in lines)] if lines else ():
        say(line)
    return 1 if lines else 0


def existing(path: Path) -> Path:
    """The path itself."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return path


def output_file(path: Path, option: str, *suffixes: str) -> Path:
    """Check the name of a file to write.

    Raises:
        InputError: another suffix, a folder, or a folder that does not exist.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{option}: expected a name that ends in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise InputError(f"{option}: expected the name of a file, {path} is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{option}: the folder {path.parent} does not exist; make it first")
    return path
