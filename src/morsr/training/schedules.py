"""What changes from generator step to generator step: learning rates, and how many ranks may run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import lightning as L

from morsr.errors import ConfigError

ScheduleName = Literal["constant", "cosine"]


def learning_rate_factor(schedule: ScheduleName, *, warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step.

    Args:
        schedule: "constant", or "cosine" from 1 to 0 over the steps after the warm-up.
        warmup: steps of linear rise at the start.
        total: all steps; only the cosine needs it. A run shorter than its warm-up never leaves it.

    Raises:
        ConfigError: an unknown name, or a cosine without an end.

    >>> factor = learning_rate_factor("cosine", warmup=2, total=10)
    >>> [round(factor(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if schedule not in ("constant", "cosine"):
        raise ConfigError(f"schedule: expected 'constant' or 'cosine', got {schedule!r}")
    if schedule == "cosine" and total < 1:
        raise ConfigError(f"a cosine schedule needs a number of steps: set trainer.max_steps (got {total})")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of a run, or -1 where it only ends by the clock or by hand."""
    steps = trainer.estimated_stepping_batches
    return -1 if math.isinf(steps) else int(steps)
