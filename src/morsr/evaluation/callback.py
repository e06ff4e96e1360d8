"""The table that `morsr test` ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.adapters import active_adapters
from morsr.errors import ConfigError, InputError
from morsr.evaluation.benchmark import Method, evaluate
from morsr.evaluation.classical import classical_methods
from morsr.evaluation.images import to_uint8
from morsr.evaluation.published import PublishedRow, published_datasets, published_rows
from morsr.evaluation.tables import BenchmarkReport


@dataclass(frozen=True)
class _HeldPair:
    stem: str
    lr: np.ndarray
    hr: np.ndarray
    group: str | None = None


class BenchmarkTable(L.Callback):
    """Scores the module over the test pairs beside bicubic, two classical denoisers and the base without adapters.

    One table per test set: printed, and written as CSV, JSON and Markdown with side-by-side crops. Every output is
    rounded to 8 bits before it is scored; differences to the reference come with paired bootstrap intervals.

    Args:
        metrics: names known to `morsr score`.
        out: folder; default `benchmark/` in the run's folder.
        reference: the row that differences are taken to.
        pictures: images on the side-by-side sheet.

    Raises:
        ConfigError: more than one device, on which the rows could not be timed or paired.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
        out: str | None = None,
        reference: str = "bicubic",
        pictures: int = 4,
    ) -> None:
        self.metrics, self.out, self.reference, self.pictures = tuple(metrics), out, reference, pictures
        self.reports: dict[str, BenchmarkReport] = {}
        self._pairs: dict[str, list[_HeldPair]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "test" and trainer.world_size > 1:
            raise ConfigError(
                f"BenchmarkTable: expected one device, got {trainer.world_size}; set trainer.devices to 1"
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pairs, self.reports = {}, {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        sets = batch.get("set") or ["test"] * len(batch["stem"])
        photographs = batch.get("image") or [None] * len(batch["stem"])
        for stem, name, image, lr, hr in zip(batch["stem"], sets, photographs, batch["lr"], batch["hr"], strict=True):
            self._pairs.setdefault(name, []).append(_HeldPair(stem, to_uint8(lr[None]), to_uint8(hr[None]), image))

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(self.out or Path(trainer.log_dir or trainer.default_root_dir) / "benchmark")
        scale = getattr(trainer.datamodule, "scale", 4)
        methods = {**classical_methods(scale), **model_methods(pl_module, scale)}
        for name, pairs in self._pairs.items():
            report = evaluate(
                methods,
                _spread_first(pairs, self.pictures),
                self.metrics,
                out=folder / name,
                reference=self.reference,
                published=_published(name),
                pictures=self.pictures,
            )
            lines = "\n".join(f"- {line}" for line in _against_all(report, "morsr"))
            photographs = ", in braces with whole photographs resampled" if report.groups else ""
            report.notes = [
                *report.notes,
                f"Paired differences with 95 % bootstrap intervals{photographs}:\n{lines}",
            ]
            report.save(folder / name)
            self.reports[name] = report
            rank_zero_info(f"\n{name}: {len(pairs)} pairs\n\n{report.to_markdown()}\nwritten to {folder / name}\n")
        self._pairs = {}


def _spread_first(pairs: list[_HeldPair], count: int) -> list[_HeldPair]:
    """Evenly spaced pairs first: neighbours show the same photograph, and the sheet is drawn of the first few."""
    count = min(count, len(pairs))
    first = [index * len(pairs) // count for index in range(count)]
    return [pairs[index] for index in first] + [pair for index, pair in enumerate(pairs) if index not in first]


def _published(test_set: str) -> Sequence[PublishedRow]:
    known = {name.lower() for name in published_datasets()}
    return published_rows(test_set) if test_set.lower() in known else ()


def _against_all(report: BenchmarkReport, method: str) -> list[str]:
    """One line per other row: the paired differences of the method to it."""

    def text(metric: str, other: str) -> str:
        try:
            value = f"{metric} {report.difference(method, metric, other)}"
        except InputError:  # no image has a value of both
            return f"{metric} –"
        if not report.groups:
            return value
        wide = report.difference(method, metric, other, clustered=True)
        return f"{value} {{{wide.low:+.4f}, {wide.high:+.4f}}}"

    return [
        f"{method} against {other}: {', '.join(text(info.name, other) for info in report.image_metrics)}"
        for other in report.methods
        if other != method
    ]


def model_methods(module: Any, scale: int = 4) -> dict[str, Method]:
    """The rows "base" (adapters off) and "morsr" of a module with a `generator`, at so many times the input's sides."""

    def with_adapters(lr: Tensor) -> Tensor:
        return module(lr.to(module.device), size=(scale * lr.shape[-2], scale * lr.shape[-1])).cpu()

    def without_adapters(lr: Tensor) -> Tensor:
        with active_adapters(module.generator.backbone, None):
            return with_adapters(lr)

    return {"base": without_adapters, "morsr": with_adapters}
