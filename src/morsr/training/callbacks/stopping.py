"""How a run ends: between two steps, with a validation, and with one message that says where everything is."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from morsr.files import write_text
from morsr.training.callbacks.images import run_folder

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 1.0  # seconds: launchers pass the terminal's Ctrl-C on to processes that have got it already


class StopBetweenSteps(Callback):
    """Stops on Ctrl-C and SIGTERM between two steps; the second Ctrl-C stops at once.

    Such a stop leaves a checkpoint by every ModelCheckpoint. Within a step some networks have moved and others have
    not, so none is saved on an exception there, nor before the first step of this process. With several processes the
    signal may reach any of them: all leave after the same step. Lightning's own handler of SIGTERM is set aside during
    training, because it exchanges tensors wherever a process happens to be. `morsr fit` adds this callback.

    Attributes:
        steps: batches that this process has trained on.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._within = False
        self._asked: tuple[int, float] | None = None  # the signal and when it came
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked, self.steps = None, 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = (number, now)
            rank_zero_info("stopping after this step; Ctrl-C again stops at once")
        elif number == signal.SIGINT and now - self._asked[1] > _SAME:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self._within = True

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self._within = False
        self.steps += 1
        self._leave_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if self._before:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        number = self._asked[0] if self._asked is not None else 0
        stop, ended = number != 0, number == signal.SIGTERM
        if trainer.world_size > 1:  # all processes must leave after the same step, and in the same way
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            ended = stop and trainer.strategy.reduce_boolean_decision(ended, all=False)
        if ended:
            raise SIGTERMException(128 + signal.SIGTERM)
        if stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.steps:
            rank_zero_info(f"Nothing left to do at step {trainer.global_step}; morsr validate scores it")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
        between = bool(self.steps) and not self._within
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        alone = trainer.world_size == 1  # an error may be of one process, and saving waits for all
        for callback in trainer.checkpoint_callbacks:  # Lightning calls them after all others
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = between and (stopped or (alone and callback.save_on_exception))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class FinalValidation(Callback):
    """Validates after the last step, however short the run is, in an epoch that validates at all."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_epoch or 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates before it stops


class RunSummary(Callback):
    """Prints one closing message: where checkpoint, adapters, TensorBoard and table are, and the last validation.

    The same goes to `summary.json` in the run's folder.
    """

    def __init__(self) -> None:
        self._start = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, steps, seconds = run_folder(trainer), trainer.global_step, time.perf_counter() - self._start
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        checkpoints = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        boards = [one.log_dir for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        places = {
            "run folder": folder,
            "adapters": folder / "adapters.safetensors",
            "adapters, best": folder / "adapters-best.safetensors",
            "before and after": folder / "before_after.png",
            "load of the ranks": folder / "expert_load.png",
            "metrics table": folder / "metrics.csv",
            "checkpoint": next((one.last_model_path or one.best_model_path for one in checkpoints), ""),
            "TensorBoard": next(iter(boards), ""),
        }
        files = {name: str(path) for name, path in places.items() if path and Path(path).exists()}
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        facts = {"steps": steps, "seconds": round(seconds, 1), "files": files, "validation": values}
        write_text(folder / "summary.json", json.dumps(facts, indent=2) + "\n")
        shown = {**files, **{name: f"{value:.4f}" for name, value in values.items()}}
        lines = [f"  {name:<17}  {what}" for name, what in shown.items()]
        rank_zero_info("\n".join(["", f"Step {steps}, after {seconds:.0f} s:", *lines, ""]))
