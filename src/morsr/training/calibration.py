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

    Each process scores its share of the images and the sums are added up, so several devices start as one does.

    Args:
        trainer: whose data module gives the images.
        generator: whose estimator scores them.
        images: at least so many are looked at, over all processes.
    """
    adapters = generator.adapters
    if adapters is None or generator.estimator is None or not adapters.is_routed or adapters.router.standardized:
        return
    scores, severities = _scores(trainer, generator, -(-images // trainer.world_size))
    sums = torch.cat([scores.new_tensor([len(scores)]), scores.sum(0), scores.square().sum(0)])
    sums = _over_devices(trainer, sums)
    count, (total, squares) = sums[0], sums[1:].chunk(2)
    mean = total / count
    deviation = ((squares - count * mean.square()) / (count - 1)).clamp_min(0).sqrt()
    if trainer.world_size > 1:
        severities = trainer.strategy.all_gather(severities.to(trainer.strategy.root_device)).flatten().cpu()
    figures = (mean.float(), deviation.float(), severities.float())
    adapters.router.standardize(*(figure.to(generator.device) for figure in figures))
    rank_zero_info(f"router input standardised over {int(count)} degraded images")


def _scores(trainer: L.Trainer, generator: Any, images: int) -> tuple[Tensor, Tensor]:
    """Scores (I, D) and severities (I,) of at least so many images, in float64 on the host."""
    found: list[Tensor] = []
    severities: list[Tensor] = []
    for batch in _batches(trainer, generator):
        scores = generator.estimator(batch.get("score_lr", batch["lr"]))
        found.append(scores.scores.double().cpu())
        severities.append(known_severity(batch, scores.severity).double().cpu())
        if sum(map(len, found)) >= images:
            break
    return torch.cat(found)[:images], torch.cat(severities)[:images]


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
            z_lr, z_hr = (generator.encode(pad_to_multiple(one, generator.multiple)).cpu() for one in both)
            moments, seen = moments + pair_moments(z_lr, z_hr), seen + len(hr)
            if seen >= share:
                break
    moments = _over_devices(trainer, moments)
    t = torch.arange(STEPS, device=base.device)
    ones = torch.ones(STEPS, 1, 1, 1, device=base.device)
    noise = base.noised(torch.zeros_like(ones), ones, t).flatten()
    generator.one_step = replace(generator.one_step, timestep=matching_timestep(moments, base.signal(t), noise))
    rank_zero_info(f"timestep {generator.one_step.timestep}: found over {seen * trainer.world_size} pairs")


def _over_devices(trainer: L.Trainer, sums: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return sums
    return trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()


def _batches(trainer: L.Trainer, generator: OneStepGenerator) -> Iterator[Mapping[str, Any]]:
    """Degraded training batches on the generator's device, without end: every new iterator is the next epoch."""
    data: Any = trainer.datamodule
    loader = data.train_dataloader()
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield data.finish_batch(data.transfer_batch_to_device(batch, generator.device, 0))
        if empty:
            raise ConfigError("calibration: the training data give no batch")
