"""A callback that writes the scores of single validation images during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from morsr.errors import ConfigError
from morsr.evaluation.classical import bicubic
from morsr.evaluation.images import to_tensor, to_uint8
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.files import write_text
from morsr.models.metric_info import METRICS
from morsr.models.metrics import build_metrics
from morsr.models.scores import score_image


class ScoreDump(L.Callback):
    """After each validation, writes the scores of its images as `scores/step_000500.csv` in the run's folder.

    The logged `val/` values are means; `morsr compare` and `morsr ablation` need the images one by one. The table has
    the rows "bicubic" and "morsr", as that of `morsr score`. Where two validation sets have an image of one stem, all
    images and photographs are called `set:stem`.

    Args:
        metrics: names known to `morsr score`, of single images.

    Raises:
        ConfigError: a metric over whole sets.
    """

    def __init__(self, *, metrics: Sequence[str] = ("psnr", "ssim", "niqe")) -> None:
        over_sets = [name for name in metrics if name in METRICS and METRICS[name].kind == "set"]
        if over_sets:
            raise ConfigError(f"ScoreDump: expected metrics of single images, got {', '.join(over_sets)}")
        built = build_metrics(metrics, download=False)
        self.metrics = built.metrics
        for name, reason in built.absent.items():
            rank_zero_warn(f"{name} will not be scored: {reason}")
        self.latest: Path | None = None
        self._rows: list[ImageScore] = []
        self._sets: list[str] = []  # of every row

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows, self._sets = [], []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        photographs = batch.get("image") or [None] * len(batch["stem"])
        sets = batch.get("set") or ["val"] * len(batch["stem"])
        repeated = batch.get("repeated") or [False] * len(batch["stem"])
        for index, (stem, name, photograph) in enumerate(zip(batch["stem"], sets, photographs, strict=True)):
            if repeated[index]:  # another process has it
                continue
            truth = batch["hr"][index : index + 1].cpu()
            rows = {
                "bicubic": to_tensor(bicubic(to_uint8(batch["lr"][index : index + 1]), *truth.shape[-2:])),
                "morsr": outputs["sr"][index : index + 1].cpu(),
            }
            for method, image in rows.items():
                scores, _ = score_image(self.metrics, image, truth)
                self._rows.append(ImageScore(str(stem), method, scores, group=photograph))
                self._sets.append(str(name))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = self._with_sets(trainer.world_size)
        if not self._rows:
            return
        # Every process has scored its own share of the images.
        process = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "scores"
        self.latest = folder / f"step_{trainer.global_step:06d}{process}.csv"
        rows = self._rows
        if named:
            rows = [
                replace(row, image=f"{name}:{row.image}", group=row.group and f"{name}:{row.group}")
                for row, name in zip(rows, self._sets, strict=True)
            ]
        report = BenchmarkReport(rows=rows, metrics=[metric.info for metric in self.metrics.values()])
        # The other images of a photograph may be another process's.
        grouped = any(row.group is not None for row in rows) if process else None
        write_text(self.latest, report.to_csv(grouped=grouped))
        self._rows, self._sets = [], []

    def _with_sets(self, processes: int) -> bool:
        """Whether two sets have an image of one stem, on any process: all of them must call an image alike."""
        found = {(name, row.image) for row, name in zip(self._rows, self._sets, strict=True)}
        if processes > 1 and torch.distributed.is_initialized():
            parts: list[set[tuple[str, str]]] = [set()] * processes
            torch.distributed.all_gather_object(parts, found)
            found = set().union(*parts)
        return len({stem for _, stem in found}) < len(found)
