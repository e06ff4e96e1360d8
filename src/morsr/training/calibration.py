"""The one pass over degraded images that fixes what the router subtracts and divides by."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.errors import ConfigError
from morsr.models.generator import OneStepGenerator
from morsr.training.objective import known_severity


@torch.no_grad()
def standardize_router(trainer: L.Trainer, generator: OneStepGenerator, *, images: int) -> None:
    """Standardise the router's input by mean and deviation over degraded training images, unless that has been done.

    Each process scores its share of the images and the sums are added up, so several devices start as one does.

    Args:
        trainer: whose data module gives the images.
        generator: whose estimator scores them.
        images: at least so many are looked at, over all processes.

    Raises:
        ConfigError: the training data give no batch.
    """
    adapters = generator.adapters
    if adapters is None or generator.estimator is None or not adapters.is_routed or adapters.router.standardized:
        return
    scores, severities = _scores(trainer, generator, -(-images // trainer.world_size))
    sums = torch.cat([scores.new_tensor([len(scores)]), scores.sum(0), scores.square().sum(0)])
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
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
    data: Any = trainer.datamodule
    loader = data.train_dataloader()
    found: list[Tensor] = []
    severities: list[Tensor] = []
    while True:  # an epoch may have fewer; every new iterator is the next one
        before = len(found)
        for batch in loader:
            batch = data.finish_batch(data.transfer_batch_to_device(batch, generator.device, 0))
            scores = generator.estimator(batch.get("score_lr", batch["lr"]))
            found.append(scores.scores.double().cpu())
            severities.append(known_severity(batch, scores.severity).double().cpu())
            if sum(map(len, found)) >= images:
                return torch.cat(found)[:images], torch.cat(severities)[:images]
        if len(found) == before:
            raise ConfigError("router input: the training data give no batch to standardise it by")
