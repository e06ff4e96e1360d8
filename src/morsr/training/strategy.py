"""What training asks of a trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
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
    """Refuse DDP that waits for the gradients of those of the alternating networks that rest.

    Raises:
        ConfigError: with the strategy that works.
    """
    strategy: Any = trainer.strategy
    if networks > 1 and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ConfigError(
            f"trainer.strategy: {networks} networks take turns, and plain ddp would wait for the gradients of those "
            "that rest; set it to ddp_find_unused_parameters_true"
        )
