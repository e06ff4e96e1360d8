"""Writes the adapters as one safetensors file, at the end and whenever validation improves."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from morsr.errors import ConfigError, WeightsError
from morsr.files import atomic_path
from morsr.training.callbacks.common import run_folder
from morsr.training.callbacks.ema import AdapterEMA


class AdapterCheckpoint(Callback):
    """Keeps `<filename>.safetensors`, the newest adapters, and `<filename>-best.safetensors` in the run's folder.

    Files are written atomically. Where `AdapterEMA` runs, the average is what is written. A run stopped by Ctrl-C or
    SIGTERM leaves its newest adapters too.

    Args:
        monitor: name of the logged value that decides which adapters are best; None keeps the newest only.
        mode: "max" where higher is better, else "min".
        filename: stem of both files.
        folder: where they go; by default the run's folder.

    Raises:
        ConfigError: at the first validation, a value to monitor that is not logged.
    """

    def __init__(
        self,
        *,
        monitor: str | None = "val/psnr",
        mode: Literal["max", "min"] = "max",
        filename: str = "adapters",
        folder: str | None = None,
    ) -> None:
        self.monitor, self.mode, self.filename, self.folder = monitor, mode, filename, folder
        self.best_score: float | None = None
        self.last_path: Path | None = None
        self.best_path: Path | None = None
        self._target = Path()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Asked for here, while all processes are at the same place: the folder's name is broadcast.
        self._target = Path(self.folder) if self.folder is not None else run_folder(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        if (value := trainer.callback_metrics.get(self.monitor)) is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ConfigError(f"AdapterCheckpoint.monitor: expected one of {known}, got {self.monitor}")
        score = float(value)
        better = self.best_score is None or (score > self.best_score if self.mode == "max" else score < self.best_score)
        if better and score == score:
            self.best_score = score
            self.best_path = self._save(trainer, pl_module, f"{self.filename}-best.safetensors")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not at the end of the training: a resumed run may have no step left and still owe this file.
        if not trainer.fast_dev_run:
            self.last_path = self._save(trainer, pl_module, f"{self.filename}.safetensors")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if stopped and trainer.global_step and trainer.state.fn == "fit" and not trainer.fast_dev_run:
            try:
                self.last_path = self._save(trainer, pl_module, f"{self.filename}.safetensors")
            except WeightsError as error:  # the stop goes ahead, and the file of before is kept
                rank_zero_warn(str(error))

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_path": str(self.best_path) if self.best_path else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self.best_path = Path(state_dict["best_path"]) if state_dict["best_path"] else None

    def _save(self, trainer: L.Trainer, pl_module: Any, name: str) -> Path:
        path = self._target / name
        if trainer.is_global_zero:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            average = next((one for one in callbacks if isinstance(one, AdapterEMA)), None)
            with average.averaged(pl_module) if average else nullcontext(), atomic_path(path) as part:
                pl_module.save_adapters(part)
        return path
