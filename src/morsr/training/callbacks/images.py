"""Writes validation pictures: enlarged input, output and target side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from morsr.files import atomic_path
from morsr.imaging.figures import side_by_side

COLUMNS = ("LR (bicubic)", "ours", "HR")


class ImageGrid(Callback):
    """One row per validation image, LR by bicubic | ours | HR, to TensorBoard and as PNG into the run's folder.

    The files are images/step_000500.png and so on; `before_after.png` is always the newest.

    Args:
        num_images: the first so many validation images are shown.
        max_size: longest side of one picture in pixels; of larger ones the middle is shown, never a
            smaller copy, which would hide what super-resolution is about.
    """

    def __init__(self, *, num_images: PositiveInt = 4, max_size: PositiveInt = 512) -> None:
        self.num_images, self.max_size = num_images, max_size
        self._rows: list[dict[str, np.ndarray]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = []

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        count = self.num_images - len(self._rows)
        if count < 1 or trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if not isinstance(outputs, Mapping) or "sr" not in outputs:
            return
        hr, sr = batch["hr"][:count].float(), outputs["sr"][:count].float()
        enlarged = F.interpolate(batch["lr"][:count].float(), size=hr.shape[-2:], mode="bicubic", align_corners=False)
        triples = torch.stack([enlarged, sr, hr], dim=1).clamp(0, 1).mul(255).round().byte().cpu().movedim(2, -1)
        self._rows += [dict(zip(COLUMNS, triple.numpy(), strict=True)) for triple in triples]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if self._rows:
            paths = [folder / "images" / f"step_{trainer.global_step:06d}.png", folder / "before_after.png"]
            show_picture(
                trainer, side_by_side(self._rows, crop=self.max_size, zoom=1), tag="samples/LR_ours_HR", files=paths
            )
            self._rows = []


def run_folder(trainer: L.Trainer) -> Path:
    """The folder that the run's first logger writes to; every process must call this, since its name is broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def show_picture(trainer: L.Trainer, picture: np.ndarray, *, tag: str, files: Sequence[Path]) -> None:
    """Write a uint8 picture (H, W, 3) as PNG files and, where it is used, to TensorBoard."""
    from PIL import Image

    for path in files:
        with atomic_path(path) as part:
            Image.fromarray(picture).save(part)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, global_step=trainer.global_step, dataformats="HWC")
