"""Checkpoints that appear whole or not at all, each with a card that says what run it is from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from morsr.errors import TrainingError, WeightsError
from morsr.files import atomic_path, write_text

Card = Callable[[dict[str, Any]], dict[str, Any]]


def card_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Where the card of a checkpoint lies: `step-500.ckpt` has `step-500.card.json`."""
    return Path(checkpoint).with_suffix(".card.json")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk and moves it there in one step.

    A run that is killed, or finds the disk full, half-way leaves the checkpoint before as it was. Paths on other file
    systems (s3:// and the like) go the usual way.

    Args:
        card: makes the run card of a checkpoint; None writes none.
    """

    def __init__(self, card: Card | None = None) -> None:
        super().__init__()
        self.card = card

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write one checkpoint and its card.

        Raises:
            TrainingError: it could not be written whole; nothing has changed on the disk then.
        """
        if "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            with atomic_path(target, flush=True) as part:
                torch.save(checkpoint, part)
                if self.card is not None:  # after the large file, so that none tells of a checkpoint that never came
                    write_text(card_path(target), json.dumps(self.card(checkpoint), indent=2, default=str))
        except (OSError, RuntimeError) as error:  # torch's archive writer raises the latter when a write fails
            raise TrainingError(
                f"{target}: the checkpoint could not be written ({str(error).splitlines()[0]}); free some space and "
                "go on from the last one, which is untouched"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint; nothing in it is executed, wherever it comes from and whatever the caller asks for.

        Raises:
            WeightsError: cut short, unreachable, or with anything in it but tensors and plain values.
        """
        try:
            return super().load_checkpoint(path, map_location or "cpu", weights_only=True)
        except Exception as error:  # a damaged archive surfaces as any of half a dozen kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise WeightsError(f"{path}: cannot be read as a checkpoint ({reason})") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        super().remove_checkpoint(path)
        if "://" not in os.fspath(path):
            card_path(path).unlink(missing_ok=True)
