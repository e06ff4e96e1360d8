"""Says at the end of a run where everything is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from morsr.files import write_text
from morsr.training.callbacks.images import run_folder


class RunSummary(Callback):
    """Prints one closing message: where checkpoint, adapters, TensorBoard and table are, and the last validation.

    The same goes to `summary.json` in the run's folder.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._first: int | None = None  # None where no step is left to do

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._first = time.perf_counter(), None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.global_step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, steps, seconds = run_folder(trainer), trainer.global_step, time.perf_counter() - self._start
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        files = written_files(trainer, folder)
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        facts = {"steps": steps, "seconds": round(seconds, 1), "files": files, "validation": values}
        write_text(folder / "summary.json", json.dumps(facts, indent=2) + "\n")
        done = self._first is not None and steps > self._first
        lines = ["", f"Finished: step {steps} in {seconds:.0f} s" if done else "This run holds:"]
        width = max(map(len, files), default=0)
        shown = {**files, **{name: f"{value:.4f}" for name, value in values.items()}}
        rank_zero_info("\n".join([*lines, *(f"  {name:<{width}}  {what}" for name, what in shown.items()), ""]))


def written_files(trainer: L.Trainer, folder: Path) -> dict[str, str]:
    """Files and folders of a run, by what they hold."""
    files: dict[str, str | Path] = {
        "run folder": folder,
        "adapters": folder / "adapters.safetensors",
        "adapters, best": folder / "adapters-best.safetensors",
        "before and after": folder / "before_after.png",
        "load of the ranks": folder / "expert_load.png",
        "metrics table": folder / "metrics.csv",
    }
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            files.setdefault("checkpoint", one.last_model_path or one.best_model_path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            files["TensorBoard"] = logger.log_dir
    return {name: str(path) for name, path in files.items() if path and Path(path).exists()}
