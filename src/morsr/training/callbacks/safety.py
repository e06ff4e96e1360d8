"""Keeps a run restartable: whole checkpoints with cards, and a Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from morsr.training.checkpoint_io import AtomicCheckpointIO
from morsr.training.run_card import run_card


class RunSafety(Callback):
    """Writes checkpoints atomically with a run card beside each, and stops on Ctrl-C between two steps.

    In the middle of a step some networks have moved and others have not; a checkpoint of that moment could not be
    resumed exactly. The second Ctrl-C stops at once. `morsr fit` adds this callback by itself; put it last.

    Args:
        config: the resolved config, for the cards.
    """

    def __init__(self, *, config: Any = None) -> None:
        self.config = config
        self._stop = False
        self._before: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(
                lambda checkpoint: run_card(trainer, pl_module, self.config)
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        rank_zero_info("stopping after this step; Ctrl-C again stops at once")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop = self._stop
        if trainer.world_size > 1:  # all processes must leave at the same step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
