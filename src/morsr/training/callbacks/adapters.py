"""Averages what a module trains, and writes its adapters at the end and whenever validation improves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from morsr.errors import ConfigError, WeightsError
from morsr.files import atomic_path
from morsr.training.callbacks.images import run_folder


class AdapterEMA(Callback):
    """Averages the trained parameters; validation, test, prediction and saved adapters use the average.

    Training continues with the parameters themselves. Checkpoints hold both, so a resumed run equals a straight one.
    A module may name what is averaged by `averaged_parameters()`.

    Args:
        decay: share of the old average that stays at each step, in (0, 1).
        warmup: the decay is at most (1 + n) / (warmup + n) at the n-th step, so that the start is soon forgotten;
            0 for none.
    """

    def __init__(self, *, decay: OpenUnitInterval = 0.999, warmup: NonNegativeInt = 10) -> None:
        self.decay, self.warmup = decay, warmup
        self._average: dict[str, Tensor] = {}
        self._updates = 0
        self._is_swapped = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        # The start is part of the average; that of a checkpoint comes on the host.
        self._average = {
            name: self._average.get(name, value.detach().clone()).to(value.device)
            for name, value in _trained(pl_module).items()
        }
        self._updates = max(self._updates, 1)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            n = self._updates
            decay = min(self.decay, (1 + n) / (self.warmup + n)) if self.warmup else self.decay
            get_ema_multi_avg_fn(decay)(list(self._average.values()), list(_trained(pl_module).values()), n)
            self._updates += 1

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Put the average into the model for the length of a with-block, unless it is in already."""
        before = self._is_swapped
        self._swap(pl_module, True)
        try:
            yield
        finally:
            self._swap(pl_module, before)

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule, wanted: bool) -> None:
        if wanted != self._is_swapped and self._average:
            for name, theirs in _trained(pl_module).items():
                kept = theirs.clone()
                theirs.copy_(self._average[name])
                self._average[name].copy_(kept)
            self._is_swapped = wanted

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, True)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not at the end of a test, where later callbacks still score the module.
        self._swap(pl_module, False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # A run stopped during validation must not write the average as the parameters.
        self._swap(pl_module, False)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._average = int(state_dict["updates"]), dict(state_dict["average"])


def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """A with-block in which the model holds the run's average, where `AdapterEMA` keeps one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    average = next((one for one in callbacks if isinstance(one, AdapterEMA)), None)
    return average.averaged(pl_module) if average else nullcontext()


def _trained(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    if hasattr(pl_module, "averaged_parameters"):
        return pl_module.averaged_parameters()  # type: ignore[operator,return-value]
    return {name: value for name, value in pl_module.named_parameters() if value.requires_grad}


class AdapterCheckpoint(Callback):
    """Keeps `adapters.safetensors`, the newest, and `adapters-best.safetensors` in the run's folder.

    Files are written atomically. Where `AdapterEMA` runs, the average is what is written. A run stopped by Ctrl-C or
    SIGTERM leaves its newest adapters too.

    Args:
        monitor: name of the logged value that decides which adapters are best; None keeps the newest only.
        mode: "max" where higher is better, else "min".
        keep_every: steps after which `adapters-step-N.safetensors` is kept, to choose from by eye; None keeps none.

    Raises:
        ConfigError: at the first validation, a value to monitor that is not logged.
    """

    def __init__(
        self,
        *,
        monitor: str | None = "val/psnr",
        mode: Literal["max", "min"] = "max",
        keep_every: PositiveInt | None = None,
    ) -> None:
        self.monitor, self.mode, self.keep_every = monitor, mode, keep_every
        self.best_score: float | None = None
        self._best, self._target = Path(), Path()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here, where all processes are: at an exception some of them may be elsewhere.
        self._target = run_folder(trainer)
        resumed = self._best.is_file() and self._best.parent != self._target.absolute()
        if resumed and trainer.is_global_zero and not trainer.fast_dev_run:
            self._target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._best, self._target / self._best.name)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        step = trainer.global_step
        if self.keep_every and step and step % self.keep_every == 0 and not trainer.fast_dev_run:
            self._save(trainer, pl_module, f"-step-{step}")

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
            self._save(trainer, pl_module, "-best")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not at the end of the training: a resumed run may have no step left and still owe this file.
        if not trainer.fast_dev_run:
            self._save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if stopped and trainer.global_step and trainer.state.fn == "fit" and not trainer.fast_dev_run:
            try:
                self._save(trainer, pl_module)
            except WeightsError as error:  # the stop goes ahead, and the file of before is kept
                rank_zero_warn(str(error))

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best": str(self._target.absolute() / "adapters-best.safetensors")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._best = state_dict["best_score"], Path(state_dict.get("best", ""))

    def _save(self, trainer: L.Trainer, pl_module: Any, ending: str = "") -> None:
        if trainer.is_global_zero:
            with averaged(trainer, pl_module), atomic_path(self._target / f"adapters{ending}.safetensors") as part:
                pl_module.save_adapters(part)
