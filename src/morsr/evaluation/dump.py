"""Writes the routing of the validation images during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.errors import ConfigError
from morsr.evaluation.routing import RoutingTable


class RoutingDump(Callback):
    """After each validation, writes the routing of its images as `routing/step_000500.safetensors` in the run's folder.

    `RoutingTable.load` reads the files, and `morsr routing FILE --out report.html` makes a page of one. The true
    severities go along where all batches bring their `parameters`, as those of RealESRGANDataModule do.

    Args:
        max_images: the first so many images of each validation, per process.

    Raises:
        ConfigError: max_images below 1.
    """

    def __init__(self, *, max_images: int = 1000) -> None:
        if max_images < 1:
            raise ConfigError(f"RoutingDump: max_images: expected at least 1, got {max_images}")
        self.max_images = max_images
        self.latest: Path | None = None
        self._parts: list[RoutingTable] = []
        self._told = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.max_images - sum(len(part) for part in self._parts)
        if missing <= 0 or trainer.sanity_checking or not (isinstance(batch, Mapping) and "lr" in batch):
            return
        context = getattr(getattr(pl_module, "generator", None), "context", None)
        if context is None or not context.config.is_routed:
            if not self._told:
                rank_zero_info("RoutingDump: this model has no routing; nothing is written")
                self._told = True
            return
        lr: Tensor = batch["lr"][:missing]
        names = [str(stem) for stem in batch.get("stem", ())][:missing]
        parameters = batch.get("parameters")
        parameters = parameters[: len(lr)] if parameters is not None else None
        recipe = getattr(trainer.datamodule, "recipe", "realesrgan")
        self._parts.append(RoutingTable.from_images(pl_module, lr, parameters, recipe=recipe, names=names))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self._parts:
            return
        # Every process has seen its own share of the images and writes it.
        process = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.latest = folder / "routing" / f"step_{trainer.global_step:06d}{process}.safetensors"
        if not all(part.truth for part in self._parts):
            self._parts = [replace(part, truth={}) for part in self._parts]
        RoutingTable.concatenate(self._parts).save(self.latest)
        self._parts = []
