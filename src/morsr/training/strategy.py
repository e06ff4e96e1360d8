"""What training and prediction ask of a trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from morsr.errors import ConfigError


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse settings under which the networks would train wrongly or not at all.

    Raises:
        ConfigError: float16, or weights kept in half precision; a strategy that splits parameters.
    """
    precision, strategy = str(trainer.precision), trainer.strategy
    if precision not in ("32-true", "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision: expected bf16-mixed or 32-true, got {precision}: the one-step arithmetic leaves the "
            "range of float16, and ranks stored in bfloat16 hardly move at a small learning rate"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(
            f"trainer.strategy: expected one device or DDP, got {type(strategy).__name__}: the adapters are small "
            "enough to need no splitting"
        )


def check_turns(trainer: L.Trainer, *, networks: int) -> None:
    """Refuse DDP that waits for the gradients of networks that rest.

    Args:
        trainer: of the run.
        networks: how many networks alternate.

    Raises:
        ConfigError: with the strategy that works.
    """
    strategy: Any = trainer.strategy
    if networks > 1 and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ConfigError(
            f"trainer.strategy: {networks} networks take turns, and plain ddp would wait for the gradients of those "
            "that rest; set it to ddp_find_unused_parameters_true"
        )


def check_writer(trainer: L.Trainer) -> None:
    """Refuse a prediction whose results nobody would get.

    Raises:
        ConfigError: no prediction writer among the callbacks, and nobody who takes what `predict` returns.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
        return
    # The command line keeps its config by such a callback, and drops what `predict` returns.
    from_command_line = any(isinstance(callback, SaveConfigCallback) for callback in callbacks)
    if from_command_line or not trainer.predict_loop.return_predictions:
        raise ConfigError(
            "trainer.callbacks: expected a prediction writer, got none, so nothing would be kept; give one, or "
            "use morsr upscale"
        )
