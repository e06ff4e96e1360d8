"""Optimizers and schedules of the alternating networks, and what they ask of a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from morsr.adapters.inject import report_of
from morsr.errors import ConfigError
from morsr.training.objective import Objective
from morsr.training.step import Network

ScheduleName = Literal["constant", "cosine"]


def build_networks(
    objective: Objective,
    *,
    lr: float,
    router_lr_scale: float,
    saved_lr_scale: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup: int,
    schedule: ScheduleName,
    total_steps: int,
    optimizers: Mapping[str, Callable[[Any], torch.optim.Optimizer]] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> list[Network]:
    """The networks of an objective with their optimizers, the generator first.

    Args:
        objective: whose networks they are.
        lr: learning rate of the generator's ranks; the other networks have separate rates.
        router_lr_scale: the router's learning rate over that of the ranks.
        saved_lr_scale: that of modules_to_save, which have no weight decay.
        weight_decay, betas: of AdamW, for all networks.
        warmup: steps of linear rise, counted from each network's first step.
        schedule: "constant" or "cosine" to zero at the last step.
        total_steps: generator steps of the run, for the cosine; a helper that starts later has as many fewer.
        optimizers: by network, what makes its optimizer from its parameter groups, rather than AdamW; the
            groups bring the learning rates above, so that its own has no effect.
        scheduler: what makes a schedule from an optimizer, rather than warmup and schedule.

    Raises:
        ConfigError: an optimizer for a network that the losses do not ask for, or that cannot take its groups.
    """
    optimizers, helpers, trained = optimizers or {}, objective.helpers, objective.trained()
    if unknown := sorted(set(optimizers) - set(trained)):
        raise ConfigError(f"optimizers.{unknown[0]}: no such network; expected {', '.join(trained)}")
    networks = []
    for name, parameters in trained.items():
        rate, start = (helpers[name].lr, helpers[name].start) if name in helpers else (None, 0)
        rate = lr if rate is None else rate
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": rate}]
        if name == "generator":
            adapters = report_of(objective.base)
            ranks = [parameter for layer in adapters.layers for parameter in layer.sets[name].parameters()]
            saved = [parameter for module in adapters.copies.values() for parameter in module.parameters()]
            groups = [
                {"params": ranks, "lr": lr, "name": "ranks"},
                # The router's gradient comes through the small gates of a few slots, so it needs a higher rate.
                {"params": list(adapters.router.parameters()), "lr": lr * router_lr_scale, "name": "router"},
                # Weights that were pretrained without ranks have no reason to shrink.
                {"params": saved, "lr": lr * saved_lr_scale, "name": "saved", "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
        if name in optimizers:
            try:
                optimizer = optimizers[name](groups)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"optimizers.{name}: {error}") from error
        else:
            optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=weight_decay)
        # A helper whose start lies after the end of the run never moves, but its cosine still needs a step.
        steps = max(total_steps - start, 1) if total_steps > 0 else total_steps
        if scheduler is not None:
            course = scheduler(optimizer)
            if isinstance(course, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ConfigError("scheduler: expected one that goes by the step, got ReduceLROnPlateau, which waits")
        else:
            factor = learning_rate_factor(schedule, warmup=warmup, total=steps)
            course = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        networks.append(Network(name, parameters, optimizer, course))
    return networks


def learning_rate_factor(schedule: ScheduleName, *, warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step.

    Args:
        schedule: "constant", or "cosine" from 1 to 0 over the steps after the warm-up.
        warmup: steps of linear rise at the start.
        total: all steps; only the cosine needs it. A run shorter than its warm-up never leaves it.

    Raises:
        ConfigError: a cosine without an end.

    >>> factor = learning_rate_factor("cosine", warmup=2, total=10)
    >>> [round(factor(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
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


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse settings under which the networks would train wrongly or not at all."""
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
    if any(getattr(one, "_train_time_interval", None) for one in trainer.checkpoint_callbacks):
        raise ConfigError("ModelCheckpoint: expected every_n_train_steps; train_time_interval would save nothing")


def check_turns(trainer: L.Trainer, *, networks: int) -> None:
    """Refuse DDP that waits for the gradients of those of the alternating networks that rest."""
    strategy: Any = trainer.strategy
    if networks > 1 and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ConfigError(
            f"trainer.strategy: {networks} networks take turns, and plain ddp would wait for the gradients of those "
            "that rest; set it to ddp_find_unused_parameters_true"
        )
