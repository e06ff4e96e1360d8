"""Files that appear under their name whole or not at all, with a new file's permissions; names fit to be printed."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, flush: bool = False) -> Iterator[Path]:
    """Give an empty temporary file beside `path`, and move it there when the block ends without an error.

    The temporary name is hidden and keeps the suffix, because writers choose their format by it. The file's mode is
    that of a newly made file, also where a writer replaces the file by a private one.

    Args:
        path: where the file is to appear; its folder is made.
        flush: wait until the content is on the disk before it takes its place.

    Raises:
        OSError: it cannot be written; the error names `path`, which stays as it was.
    """
    target = Path(path)
    part = target.with_name(f".morsr-{secrets.token_hex(6)}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:
            part.chmod(mode)
        if flush:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, part, os.fspath(part)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which ~ at the begin is the home folder; as it is where no user is called so, as in `~$draft`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_writable(folder: Path) -> None:
    """Raise OSError, which names the folder, if no file can be made in it or in the nearest one above that exists."""
    near = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(folder)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; see `atomic_path`."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file; see `atomic_path`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        try:
            save_file(tensors, part, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error


def say(text: str) -> None:
    """Print one line on the error stream; see `printable`."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text for one line of a terminal, such as a file's name: what is not a visible character is escaped.

    >>> printable("two\\nlines \\x1b[2J")
    'two\\\\nlines \\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
