"""What is found once over degraded images before the first step: what the router subtracts, and the timestep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.adapters import active_adapters
from morsr.errors import ConfigError
from morsr.functional.diffusion import matching_timestep, pair_moments
from morsr.models.bases.base import STEPS
from morsr.models.generator import OneStepGenerator, enlarge, pad_to_multiple
from morsr.training.objective import known_severity


@torch.no_grad()
def standardize_router(trainer: L.Trainer, generator: OneStepGenerator, *, images: int) -> None:
    """Standardise the router's input by mean and deviation over degraded training images, unless that has been done.

    Each process scores its share of the images, and all take the statistics of all, so several devices start as one.

    Args:
        trainer: whose data module gives the images.
        generator: whose estimator scores them.
        images: at least so many are looked at, over all processes.
    """
    adapters, share = generator.adapters, -(-images // trainer.world_size)
    if adapters is None or generator.estimator is None or not adapters.is_routed or adapters.router.standardized:
        return
    rows: list[Tensor] = []  # scores and severity of an image, in float64 on the host
    for batch in _batches(trainer, generator):
        found = generator.estimator(batch.get("score_lr", batch["lr"]))
        rows += torch.cat([found.scores, known_severity(batch, found.severity)[:, None]], dim=1).cpu().double()
        if len(rows) >= share:
            break
    table = _of_all_devices(trainer, torch.stack(rows[:share]))
    figures = table[:, :-1].mean(0), table[:, :-1].std(0), table[:, -1]
    adapters.router.standardize(*(figure.float().to(generator.base.device) for figure in figures))
    rank_zero_info(f"router input standardised over {len(table)} degraded images")


@torch.no_grad()
def find_timestep(trainer: L.Trainer, generator: OneStepGenerator, *, pairs: int = 256) -> None:
    """Find the timestep of a generator that has none yet, as `matching_timestep` does, by the base's own encoder.

    Args:
        trainer: whose data module gives the pairs.
        generator: whose `one_step` gets the number.
        pairs: so many are encoded at least, over all processes.
    """
    if generator.one_step.timestep != "auto":
        return
    base, seen, share = generator.base, 0, -(-pairs // trainer.world_size)
    moments = torch.zeros(4, dtype=torch.float64)
    with active_adapters(base, None):
        for batch in _batches(trainer, generator):
            hr = batch["hr"]
            both = (enlarge(batch["lr"], (hr.shape[-2], hr.shape[-1])), hr)
            z_lr, z_hr = (generator.encode(pad_to_multiple(one, generator.base.multiple)).cpu() for one in both)
            moments, seen = moments + pair_moments(z_lr, z_hr), seen + len(hr)
            if seen >= share:
                break
    moments = _of_all_devices(trainer, moments[None]).sum(0)
    t = torch.arange(STEPS, device=base.device)
    ones = torch.ones(STEPS, 1, 1, 1, device=base.device)
    noise = base.noised(torch.zeros_like(ones), ones, t).flatten()
    generator.one_step = replace(generator.one_step, timestep=matching_timestep(moments, base.signal(t), noise))
    rank_zero_info(f"timestep {generator.one_step.timestep}: found over {seen * trainer.world_size} pairs")


def _of_all_devices(trainer: L.Trainer, rows: Tensor) -> Tensor:
    """Rows (N, C) of every process, one after the other, on the host."""
    if trainer.world_size == 1:
        return rows
    return trainer.strategy.all_gather(rows.to(trainer.strategy.root_device)).flatten(0, 1).cpu()


def _batches(trainer: L.Trainer, generator: OneStepGenerator) -> Iterator[Mapping[str, Any]]:
    """Degraded training batches on the generator's device, without end: every new iterator is the next epoch."""
    data: Any = trainer.datamodule
    if data is None:
        raise ConfigError("fit: expected a data module, whose first batches standardise the router; got a loader")
    loader = data.train_dataloader()
    while True:
        empty = True
        for batch in loader:
            empty = False
            moved = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), generator.base.device, 0)
            yield data.on_after_batch_transfer(moved, 0)
        if empty:
            raise ConfigError("calibration: the training data give no batch")
