"""Says at the end of a run where everything is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from morsr.files import write_text
from morsr.training.callbacks.checkpoint import AdapterCheckpoint
from morsr.training.callbacks.common import run_folder
from morsr.training.callbacks.images import ImageGrid
from morsr.training.callbacks.utilization import ExpertUtilization


class RunSummary(Callback):
    """Prints one closing message: where checkpoint, adapters, TensorBoard and table are, and the validation's values.

    The same goes to `summary.json` in the run's folder, with the values of every validation.
    """

    def __init__(self) -> None:
        self._validations: list[dict[str, float]] = []
        self._start, self._first = 0.0, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._first, self._validations = time.perf_counter(), -1, []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            self._validations.append({"step": trainer.global_step, **values})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        steps, seconds = trainer.global_step, time.perf_counter() - self._start
        files = _written(trainer, folder)
        facts = {"steps": steps, "seconds": round(seconds, 1), "files": files, "validation": self._validations}
        write_text(folder / "summary.json", json.dumps(facts, indent=2) + "\n")
        began = self._first if self._first >= 0 else steps
        head = f"Finished: step {steps} in {seconds:.0f} s" if steps > began else f"Nothing left to do at step {steps}"
        width = max(map(len, files), default=0)
        lines = ["", head, *(f"  {name:<{width}}  {path}" for name, path in files.items())]
        if self._validations:
            first, last = self._validations[0], self._validations[-1]
            for name in (name for name in last if name != "step"):
                change = f"  ({last[name] - first.get(name, last[name]):+.4f})" if len(self._validations) > 1 else ""
                lines.append(f"  {name:<{width}}  {last[name]:.4f}{change}")
        rank_zero_info("\n".join([*lines, ""]))


def _written(trainer: L.Trainer, folder: Path) -> dict[str, str]:
    files: dict[str, str | Path | None] = {"run folder": folder}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        if isinstance(one, ModelCheckpoint):
            files.setdefault("checkpoint", one.last_model_path or one.best_model_path)
        elif isinstance(one, AdapterCheckpoint):
            files |= {"adapters": one.last_path, "adapters, best": one.best_path}
        elif isinstance(one, ImageGrid):
            files["before and after"] = one.latest
        elif isinstance(one, ExpertUtilization):
            files["load of the ranks"] = folder / "expert_load.png"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            files["TensorBoard"] = logger.log_dir
        elif isinstance(logger, CSVLogger):
            files["metrics table"] = Path(logger.log_dir) / "metrics.csv"
    if tables := sorted((folder / "routing").glob("*.safetensors")):
        files["routing table"] = tables[-1]
    return {name: str(path) for name, path in files.items() if path and Path(path).exists()}
