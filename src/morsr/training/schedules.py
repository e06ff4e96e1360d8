"""What changes from generator step to generator step: learning rates, and how many ranks may run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import lightning as L
import torch

from morsr.adapters import MoRConfig
from morsr.errors import ConfigError
from morsr.models.draws import Draws

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


def random_budget(config: MoRConfig, share: float, *, seed: int, step: int) -> int | None:
    """Routed ranks that may run in a step, the same on all devices; None for all of them.

    Args:
        config: how many there are.
        share: of the steps that get a budget, drawn evenly from 0 to one less than all.
        seed: of the run.
        step: of the generator.

    Source: nested dropout (arXiv 1402.0915), by which fewer ranks become a smaller version of all.
    """
    if not (share and config.is_routed):
        return None
    draws = Draws.of_step(seed=seed, step=step, first=0, count=1, device=torch.device("cpu"))
    if int(draws.timesteps("budget/whether", 0, 9999)) >= 10000 * share:
        return None
    return int(draws.timesteps("budget", 0, config.top_k * config.expert_rank - 1))
