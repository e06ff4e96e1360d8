"""Callbacks: the table that `morsr test` ends with, and the scores of single images during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.adapters import active_adapters
from morsr.errors import ConfigError
from morsr.evaluation.images import to_uint8
from morsr.evaluation.score import BICUBIC, Method, bicubic_method, evaluate
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.files import write_text


class BenchmarkTable(L.Callback):
    """Scores the module over the test pairs beside bicubic and the base without adapters.

    One table per test set: printed, and written as CSV and Markdown with side-by-side crops. Every output is
    rounded to 8 bits before it is scored; differences come with paired bootstrap intervals over photographs.

    Args:
        metrics: names known to `morsr score`.
        out: folder; default `benchmark/` in the run's folder.

    Raises:
        ConfigError: more than one device, whose images could not be paired.
    """

    def __init__(self, *, metrics: Sequence[str] = ("psnr", "ssim", "niqe"), out: str | None = None) -> None:
        self.metrics, self.out = tuple(metrics), out
        self.reports: dict[str, BenchmarkReport] = {}
        self._pairs: dict[str, list[SimpleNamespace]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "test" and trainer.world_size > 1:
            raise ConfigError(
                f"BenchmarkTable: expected one device, got {trainer.world_size}; set trainer.devices to 1"
            )

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        first = sum(map(len, self._pairs.values()))
        for index, (stem, name, group) in enumerate(_names(batch, "test", range(first, first + len(batch["hr"])))):
            lr, hr = (to_uint8(batch[side][index : index + 1]) for side in ("lr", "hr"))
            self._pairs.setdefault(name, []).append(SimpleNamespace(stem=stem, lr=lr, hr=hr, group=group))

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(self.out or Path(trainer.log_dir or trainer.default_root_dir, "benchmark"))
        methods = module_methods(pl_module, trainer)
        self.reports = {}
        for name, pairs in self._pairs.items():
            report = evaluate(methods, pairs, self.metrics, out=folder / name)
            self.reports[name] = report
            rank_zero_info(f"\n{name}: {report.to_text()}\nall scores and pictures: {folder / name}\n")
        self._pairs = {}


def module_methods(module: Any, trainer: L.Trainer) -> dict[str, Method]:
    """The rows "bicubic", "base" (adapters off) and "morsr" of a module with a `generator`, in the run's precision."""
    scale, precision = getattr(trainer.datamodule, "scale", module.generator.one_step.scale), trainer.precision_plugin

    def with_adapters(lr: Tensor) -> Tensor:
        with precision.test_step_context():
            lr = precision.convert_input(lr.to(module.device))
            return module(lr, size=(scale * lr.shape[-2], scale * lr.shape[-1])).float().cpu()

    def without_adapters(lr: Tensor) -> Tensor:
        with active_adapters(module.generator.base, None):
            return with_adapters(lr)

    return {BICUBIC: bicubic_method(scale), "base": without_adapters, "morsr": with_adapters}


class ScoreDump(L.Callback):
    """After each validation, writes the scores of its images as `scores/step_000500.csv` in the run's folder.

    The logged `val/` values are means; `morsr compare` needs the images one by one. Which metrics is the module's
    setting `val_metrics`. Where two validation sets have an image of one stem, give them different stems.
    """

    def __init__(self) -> None:
        self._rows: list[ImageScore] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        count, first = len(batch["hr"]), len(self._rows)
        places = [place * trainer.world_size + trainer.global_rank for place in range(first, first + count)]
        repeated = batch.get("repeated") or [False] * count  # another process has those
        names = [name for name, again in zip(_names(batch, "val", places), repeated, strict=True) if not again]
        scored, metrics = pl_module.scores.rows, pl_module.scores.metrics
        for (stem, name, group), row in zip(names, scored[len(scored) - len(names) :], strict=True):
            values = dict(zip(metrics, row[0].tolist(), strict=True))
            self._rows.append(ImageScore(f"{name}:{stem}", "morsr", values, group))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all processes are asked
        if self._rows:
            report = BenchmarkReport(self._rows, list(pl_module.scores.metrics.values()))
            process = f".{trainer.global_rank}" if trainer.world_size > 1 else ""  # each writes its share of the images
            name = f"step_{trainer.global_step:06d}{process}.csv"
            write_text(folder / "scores" / name, report.to_csv())
        self._rows = []


def _names(batch: Mapping[str, Any], default: str, places: Sequence[int]) -> list[tuple[str, str, str | None]]:
    """(stem, set, photograph) of every image of a batch; where the data module gives no stems, its place."""
    stems, sets = batch.get("stem") or [f"{place:05d}" for place in places], batch.get("set") or [default] * len(places)
    photographs = batch.get("image") or [None] * len(places)
    return [(str(s), str(n), p if p is None else f"{n}:{p}") for s, n, p in zip(stems, sets, photographs, strict=True)]
