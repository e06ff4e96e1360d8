"""Writes validation pictures: enlarged input, output and target side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from morsr.training.callbacks.common import run_folder, show_picture

COLUMNS = ("LR (bicubic)", "ours", "HR")


class ImageGrid(Callback):
    """One row per validation image, LR by bicubic | ours | HR, to TensorBoard and as PNG into the run's folder.

    The files are images/step_000500.png and so on; `before_after.png` is always the newest.

    Args:
        num_images: the first so many validation images are shown.
        max_size: longest side of one picture in pixels; larger ones are centre-cropped, never shrunk, because a
            smaller copy would hide what super-resolution is about.
    """

    def __init__(
        self,
        *,
        num_images: PositiveInt = 4,  # type: ignore[valid-type]
        max_size: PositiveInt = 512,  # type: ignore[valid-type]
    ) -> None:
        self.num_images, self.max_size = num_images, max_size
        self.latest: Path | None = None
        self._rows: list[Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = []

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        count = self.num_images - len(self._rows)
        if count < 1 or trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if not isinstance(outputs, Mapping) or "sr" not in outputs:
            return
        hr, sr = batch["hr"][:count].float(), outputs["sr"][:count].float()
        enlarged = F.interpolate(batch["lr"][:count].float(), size=hr.shape[-2:], mode="bicubic", align_corners=False)
        triples = torch.stack([enlarged, sr, hr], dim=1).clamp(0, 1)
        self._rows.extend(_crop(triples, self.max_size).mul(255).round().byte().cpu())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if not self._rows:
            return
        paths = [folder / "images" / f"step_{trainer.global_step:06d}.png", folder / "before_after.png"]
        show_picture(trainer, compose(self._rows), tag="samples/LR_ours_HR", files=paths)
        self._rows = []
        self.latest = paths[-1]


def compose(rows: list[Tensor], *, gap: int = 4) -> np.ndarray:
    """Lay out uint8 rows (columns, 3, H, W), whose sizes may differ, as one captioned picture (H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    strips = [np.asarray(_row(row, gap)) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    header = 20
    canvas = Image.new("RGB", (width, header + sum(len(strip) + gap for strip in strips) - gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    cell = rows[0].shape[-1] + gap
    for column, caption in enumerate(COLUMNS):
        draw.text((column * cell + 3, 1), caption, fill="black", font=font)
    top = header
    for strip in strips:
        canvas.paste(Image.fromarray(strip), (0, top))
        top += len(strip) + gap
    return np.asarray(canvas)


def _row(row: Tensor, gap: int) -> np.ndarray:
    padded = F.pad(row, (0, gap), value=255)
    return rearrange(padded, "column channel height width -> height (column width) channel")[:, :-gap].numpy()


def _crop(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
    return images[..., top : top + size, left : left + size]
