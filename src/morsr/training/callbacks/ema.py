"""Exponential moving average of what a module trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from morsr.errors import ConfigError, WeightsError


class AdapterEMA(Callback):
    """Averages the trained parameters; validation, test, prediction and saved adapters use the average.

    Training goes on with the parameters themselves. Checkpoints hold both, so a resumed run equals a straight one.

    Args:
        decay: share of the old average that stays at each step, in (0, 1).
        warmup: the decay is at most (1 + n) / (warmup + n) at the n-th step, so that the start is soon forgotten;
            0 for none.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, *, decay: float = 0.999, warmup: int = 10) -> None:
        if not 0 < decay < 1 or warmup < 0:
            raise ConfigError(f"AdapterEMA: expected decay in (0, 1) and warmup >= 0, got {decay} and {warmup}")
        self.decay, self.warmup = decay, warmup
        self._average: AveragedModel | None = None
        self._stored: dict[str, Any] | None = None
        self._names: list[str] = []
        self._swapped = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._build(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        if trainer.global_step > self._step and self._average is not None:
            self._step = trainer.global_step
            self._average.update_parameters(nn.ParameterList(_trained(pl_module).values()))

    @torch.no_grad()
    def _mix(self, averages: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        decay = min(self.decay, (1 + n) / (self.warmup + n)) if self.warmup else self.decay
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _build(self, pl_module: L.LightningModule) -> None:
        trained = _trained(pl_module)
        self._names = list(trained)
        self._average = AveragedModel(nn.ParameterList(trained.values()), multi_avg_fn=self._mix)
        self._average.n_averaged.fill_(1)  # the start is part of the average
        if self._stored is None:
            return
        stored = self._stored["average"]
        if odd := sorted(stored.keys() ^ trained.keys()) or [
            name for name, value in trained.items() if stored[name].shape != value.shape
        ]:
            raise WeightsError(f"AdapterEMA: the checkpoint's average does not fit the model, see {odd[0]}")
        self._average.n_averaged.fill_(self._stored["updates"])
        with torch.no_grad():
            for mine, name in zip(self._average.module.parameters(), trained, strict=True):
                mine.copy_(stored[name])

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Put the average into the model for the length of a with-block, unless it is in already."""
        mine = self._swap(pl_module, True)
        try:
            yield
        finally:
            if mine:
                self._swap(pl_module, False)

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule, wanted: bool) -> bool:
        if self._average is None and self._stored is not None:
            self._build(pl_module)
        if self._average is None or wanted == self._swapped:
            return False
        for mine, theirs in zip(self._average.module.parameters(), _trained(pl_module).values(), strict=True):
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
        self._swapped = wanted
        return True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, False)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not at the end of a test, where later callbacks still score the module.
        self._swap(pl_module, False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # A run stopped during validation must not write the average as the parameters.
        self._swap(pl_module, False)

    def state_dict(self) -> dict[str, Any]:
        if self._average is None:
            return self._stored or {"updates": 0, "average": {}}
        average = dict(zip(self._names, (value.detach() for value in self._average.module.parameters()), strict=True))
        return {"updates": int(self._average.n_averaged), "average": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = dict(state_dict) if state_dict["average"] else None


def _trained(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    if hasattr(pl_module, "averaged_parameters"):
        return pl_module.averaged_parameters()  # type: ignore[operator,return-value]
    return {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
