"""Checkpoint files: written atomically, checked and read without unpickling, and found again after an accident."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from morsr.errors import TrainingError, WeightsError
from morsr.files import atomic_path
from morsr.models.loading import check_sums, read_checkpoint

RESUME = {"optimizer_states", "loops"}
"""What a checkpoint holds beside its weights if a run can resume from it."""

_PART = ".morsr-*.part.ckpt"  # what `atomic_path` calls the file that it writes
_ABANDONED = 3600  # seconds without a change after which the process that wrote such a file is gone


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, which appear under their name complete or not at all; none is ever unpickled."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write one checkpoint.

        Raises:
            TrainingError: it could not be written; the file of before is untouched.
        """
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
        return read_checkpoint(path, map_location=map_location)


def plain(value: Any) -> Any:
    """The same value with Python's own numbers: jsonargparse's, such as PositiveInt, could not be read back."""
    if isinstance(value, (int, float)) and type(value) not in (int, float, bool):
        return int(value) if isinstance(value, int) else float(value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


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
