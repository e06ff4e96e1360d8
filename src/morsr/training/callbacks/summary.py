"""Says at the end of a run where everything is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from morsr.files import write_text
from morsr.training.callbacks.images import run_folder


class RunSummary(Callback):
    """Prints one closing message: where checkpoint, adapters, TensorBoard and table are, and the validation's values.

    The same goes to `summary.json` in the run's folder, with the values of every validation. A callback names its files
    by a dictionary `written`.
    """

    def __init__(self) -> None:
        self._validations: list[dict[str, float]] = []
        self._start = 0.0
        self._first: int | None = None  # None where no step is left to do

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._first, self._validations = time.perf_counter(), None, []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            self._validations.append({"step": trainer.global_step, **values})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, steps, seconds = run_folder(trainer), trainer.global_step, time.perf_counter() - self._start
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        files = written_files(trainer, folder)
        facts = {"steps": steps, "seconds": round(seconds, 1), "files": files, "validation": self._validations}
        write_text(folder / "summary.json", json.dumps(facts, indent=2) + "\n")
        done = self._first is not None and steps > self._first
        lines = ["", f"Finished: step {steps} in {seconds:.0f} s" if done else "This run holds:"]
        width = max(map(len, files), default=0)
        lines += [f"  {name:<{width}}  {path}" for name, path in files.items()]
        if self._validations:
            first, last = self._validations[0], self._validations[-1]
            for name in (name for name in last if name != "step"):
                change = f"  ({last[name] - first.get(name, last[name]):+.4f})" if len(self._validations) > 1 else ""
                lines.append(f"  {name:<{width}}  {last[name]:.4f}{change}")
        rank_zero_info("\n".join([*lines, ""]))


def written_files(trainer: L.Trainer, folder: Path) -> dict[str, str]:
    """Files and folders of a run, by what they hold."""
    files: dict[str, str | Path] = {"run folder": folder}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        files |= getattr(one, "written", {})
        if isinstance(one, ModelCheckpoint):
            files.setdefault("checkpoint", one.last_model_path or one.best_model_path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            files["TensorBoard"] = logger.log_dir
    files["metrics table"] = folder / "metrics.csv"
    return {name: str(path) for name, path in files.items() if path and Path(path).exists()}
