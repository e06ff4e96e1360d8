"""Checkpoint files: written atomically, checked and read without unpickling, and found again after an accident."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from morsr.errors import TrainingError, WeightsError
from morsr.files import atomic_path

RESUME = {"optimizer_states", "loops"}
"""What a checkpoint holds beside its weights if a run can resume from it."""

_PART = ".morsr-*.part.ckpt"  # what `atomic_path` calls the file that it writes
_ABANDONED = 3600  # seconds without a change after which the process that wrote such a file is gone


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, which appear under their name complete or not at all.

    The checksums of its zip archive are compared when a file is read. Nothing is ever unpickled, wherever a checkpoint
    comes from. Paths such as s3:// are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write one checkpoint.

        Raises:
            TrainingError: it could not be written; the file of before is untouched.
        """
        if "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_path(path, flush=True) as part:
                torch.save(
                    {key: value if key == "state_dict" else plain(value) for key, value in checkpoint.items()}, part
                )
        except (OSError, RuntimeError) as error:  # torch's archive writer raises the latter when a write fails
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{path}: the checkpoint could not be written ({reason}); free some space") from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read one checkpoint; `weights_only` is always True."""
        if not os.fspath(path).startswith(("http://", "https://")):
            return read_checkpoint(path, map_location=map_location)
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "downloaded.ckpt")
            try:
                torch.hub.download_url_to_file(os.fspath(path), file, progress=False)
                return read_checkpoint(file, map_location=map_location)
            except WeightsError as error:
                raise WeightsError(str(error).replace(file, os.fspath(path))) from error
            except (OSError, ValueError) as error:
                raise WeightsError(f"{path}: could not be downloaded ({error})") from error


def plain(value: Any) -> Any:
    """The same value with Python's own numbers: jsonargparse's, such as PositiveInt, could not be read back."""
    if isinstance(value, (int, float)) and type(value) not in (int, float, bool):
        return int(value) if isinstance(value, int) else float(value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def read_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values.

    Args:
        path: a local file, or another that fsspec opens.
        map_location: as for `torch.load`.
        whole: compare every byte with the checksums first; without that, tensors are not read until they are used.

    Raises:
        WeightsError: missing, damaged, cut short, or with objects that would have to be unpickled.
    """
    try:
        if "://" in os.fspath(path):
            found = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
        else:
            if whole:
                check_sums(path)
            found = torch.load(path, map_location=map_location, weights_only=True, mmap=not whole)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such checkpoint") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise WeightsError(f"{path}: not a whole checkpoint ({reason}); take an earlier one") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise WeightsError(f"{path}: expected a checkpoint of Lightning, got a file without a state_dict")
    return found


def newest_checkpoint(runs: Iterable[Path], *, resumes: bool = False) -> Path | None:
    """The checkpoint with the most steps in the newest run that has a whole one.

    Damaged files are passed over with a warning; what killed processes left half-written is removed.

    Args:
        runs: folders of runs, the newest first; checkpoints may lie in folders below.
        resumes: leave out files of weights alone, from which no run can resume.
    """
    for run in runs:
        steps: dict[Path, int] = {}
        for path in sorted(run.rglob("*.ckpt")):
            if path.match(_PART):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
                continue
            try:
                found = read_checkpoint(path, whole=False)
                if not resumes or found.keys() >= RESUME:
                    steps[path] = int(found.get("global_step", 0))
            except WeightsError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
            try:
                check_sums(path)
                return path
            except Exception as error:
                warnings.warn(f"passed over: {path}: {error}", stacklevel=2)
    return None


def check_sums(path: str | os.PathLike[str]) -> None:
    """Compare every byte of a checkpoint's archive with its checksum.

    Raises:
        ValueError: some differ.
    """
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is damaged")
