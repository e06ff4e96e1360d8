"""Folders that results go to, checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from morsr.errors import InputError


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder, with those above it, and see that files can be made in it.

    Raises:
        InputError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written; choose another folder")
    return folder
