"""Keeps a run restartable: whole checkpoints with cards, and a Ctrl-C or SIGTERM that waits for the end of the step."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from morsr.errors import told_of_deaths
from morsr.training.checkpoint_io import AtomicCheckpointIO
from morsr.training.run_card import run_card

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 1.0  # seconds: launchers send the terminal's Ctrl-C on to processes that have got it already


class RunSafety(Callback):
    """Writes checkpoints atomically with a run card beside each, and stops on Ctrl-C and SIGTERM between two steps.

    In the middle of a step some networks have moved and others have not; a checkpoint of that moment could not be
    resumed exactly, so an error then leaves the last one as it is. The second Ctrl-C stops at once. With several
    processes the signal may reach any of them: all leave at the end of the same step. Lightning's own handler of
    SIGTERM is set aside for the training, because it exchanges tensors wherever a process happens to be. `morsr fit`
    adds this callback by itself; put it last.

    Args:
        config: the resolved config, for the cards.
    """

    def __init__(self, *, config: Any = None) -> None:
        self.config = config
        self._asked: tuple[int, float] | None = None  # the signal and when it came
        self._before: dict[int, Any] = {}
        self._step: int | None = None  # generator steps done at the start of the step that runs now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(
                lambda checkpoint: run_card(trainer, pl_module, self.config)
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked, self._step = None, None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = (number, now)
            rank_zero_info("stopping after this step; Ctrl-C again stops at once")
        elif number == signal.SIGINT and now - self._asked[1] > _SAME:
            raise KeyboardInterrupt

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = None
        self._leave_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if self._before:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        number = self._asked[0] if self._asked is not None else 0
        stop, ended = number != 0, number == signal.SIGTERM
        if trainer.world_size > 1:  # all processes must leave at the same step, and in the same way
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            ended = stop and trainer.strategy.reduce_boolean_decision(ended, all=False)
        if ended:
            raise SIGTERMException(128 + signal.SIGTERM)
        if stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
        told_of_deaths()
        if self._step is None or trainer.global_step == self._step:
            return
        for callback in trainer.checkpoint_callbacks:  # they come after all others
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                callback.save_on_exception = False
                rank_zero_info("stopped within a step: no checkpoint is written now, the last one is whole")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
