"""Exponential moving average of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError


class AdapterEMA(Callback):
    """Keeps an exponential moving average of the generator's trainable parameters.

    The average is what validation, test, prediction and saved adapter files use; training goes on with the parameters
    themselves, and checkpoints hold both, so that a resumed run equals a straight one.

    Args:
        decay: share of the old average that stays at each optimizer step.
        warmup: the decay is at most (1 + n) / (warmup + n) at the n-th update, so that the start is soon forgotten;
            0 for none.

    Raises:
        ConfigError: decay outside (0, 1) or warmup below 0.
    """

    def __init__(self, *, decay: float = 0.999, warmup: int = 10) -> None:
        if not 0 < decay < 1 or warmup < 0:
            raise ConfigError(f"AdapterEMA: expected decay in (0, 1) and warmup >= 0, got {decay} and {warmup}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen_step = trainer.global_step
        trainable = {name: parameter for name, parameter in _named(pl_module).items() if parameter.requires_grad}
        if not self._average:
            self._average = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        self._check(trainable)
        self._average = {name: self._average[name].to(parameter) for name, parameter in trainable.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates)) if self.warmup else self.decay
        named = _named(pl_module)
        torch._foreach_lerp_(list(self._average.values()), [named[name].detach() for name in self._average], 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not at the end of the test, where callbacks that come later, such as `BenchmarkTable`, do their work.
        self._swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # A run stopped during validation must not write the average into its checkpoint as the parameters.
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self._average = dict(state_dict["average"])

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Put the average into the model for the length of a with-block; nothing happens where it is in already."""
        swapped = self._swap_in(pl_module)
        try:
            yield
        finally:
            if swapped:
                self._swap_out(pl_module)

    def _check(self, parameters: dict[str, nn.Parameter]) -> None:
        missing, unknown = parameters.keys() - self._average.keys(), self._average.keys() - parameters.keys()
        shared = parameters.keys() & self._average.keys()
        wrong = [name for name in shared if parameters[name].shape != self._average[name].shape]
        if missing or unknown or wrong:
            example = sorted([*missing, *unknown, *wrong])[0]
            raise WeightsError(
                f"AdapterEMA: the checkpoint's average does not fit the model ({len(missing)} parameters missing, "
                f"{len(unknown)} unknown, {len(wrong)} of another shape, such as {example}); resume with the config "
                "that made the checkpoint"
            )

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> bool:
        if self._raw is not None or not self.updates:
            return False
        # By name, not by requires_grad: an optimizer that is switched off for the moment changes nothing here.
        parameters = {name: parameter for name, parameter in _named(pl_module).items() if name in self._average}
        self._check(parameters)
        self._raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self._average[name])
        return True

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._raw is None:
            return
        named = _named(pl_module)
        for name, values in self._raw.items():
            named[name].copy_(values)
        self._raw = None


def _named(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    if hasattr(pl_module, "averaged_parameters"):
        return pl_module.averaged_parameters()
    return dict(getattr(pl_module, "generator", pl_module).named_parameters())
