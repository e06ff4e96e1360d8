"""Writes the routing of the validation images during training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from morsr.errors import ConfigError
from morsr.evaluation.routing import RoutingTable, common_knowledge
from morsr.models.batches import first_images


class RoutingDump(Callback):
    """After each validation, writes the routing of its images as `routing/step_000500.safetensors` in the run's folder.

    `RoutingTable.load` reads the files, and `morsr routing FILE --out report.html` makes a page of one. The true
    severities and drawn degradations go along where all batches bring their `parameters`, as those of
    RealESRGANDataModule do, but for pairs of real photographs.

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
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        room = self.max_images - sum(len(part) for part in self._parts)
        repeated = batch.get("repeated", ()) if isinstance(batch, Mapping) else ()  # by another process, the last ones
        kept = first_images(batch, min(room, repeated.index(True)) if any(repeated) else room, "lr")
        if kept is None:
            return
        context = getattr(getattr(pl_module, "generator", None), "context", None)
        if context is None or not context.config.is_routed:
            if not self._told:
                rank_zero_info("RoutingDump: this model has no routing; nothing is written")
                self._told = True
            return
        names = [str(stem) for stem in kept.get("stem", ())]
        recipe = getattr(trainer.datamodule, "val_recipe", "realesrgan")
        self._parts.append(
            RoutingTable.from_images(pl_module, kept["lr"], kept.get("parameters"), recipe=recipe, names=names)
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self._parts:
            return
        # Every process has seen its own share of the images and writes it.
        process = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.latest = folder / "routing" / f"step_{trainer.global_step:06d}{process}.safetensors"
        RoutingTable.concatenate(common_knowledge(self._parts)).save(self.latest)
        self._parts = []
