"""What the callbacks share: the run's folder, the report of the adapters, pictures for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from morsr.files import atomic_path


def run_folder(trainer: L.Trainer) -> Path:
    """The folder that the run's first logger writes to; every process of a distributed run must call this."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def adapter_report(pl_module: L.LightningModule) -> Any | None:
    """The report of the generator's routed adapters, or None for a model without routing."""
    generator = getattr(pl_module, "generator", None)
    report = getattr(generator, "adapters", None)
    return report if report is not None and report.config.is_routed else None


def show_picture(trainer: L.Trainer, picture: np.ndarray, *, tag: str, files: Sequence[Path]) -> None:
    """Write a uint8 picture (H, W, 3) as PNG files and, where it is used, to TensorBoard."""
    from PIL import Image

    for path in files:
        with atomic_path(path) as part:
            Image.fromarray(picture).save(part)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, global_step=trainer.global_step, dataformats="HWC")
