"""The one pass over degraded images that fixes what the router subtracts and divides by."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.errors import ConfigError
from morsr.estimators import score_statistics
from morsr.models.generator import OneStepGenerator


@torch.no_grad()
def standardize_router(trainer: L.Trainer, generator: OneStepGenerator, *, images: int) -> None:
    """Standardise the router's input by mean and deviation over degraded training images, unless that has been done.

    Args:
        trainer: whose data module gives the images.
        generator: whose estimator scores them.
        images: at least so many are looked at.
    """
    context, estimator, data = generator.context, generator.estimator, trainer.datamodule
    if context is None or estimator is None or not context.config.is_routed or context.standardized:
        return

    def degraded() -> Iterator[Tensor]:
        seen, loader = 0, data.train_dataloader()
        while True:  # an epoch may have fewer; every new iterator is the next one
            before = seen
            for batch in loader:
                moved = data.transfer_batch_to_device(batch, generator.device, 0)
                finished = data.finish_batch(moved)
                yield finished.get("context", finished["lr"])
                seen += len(moved["stem"])
                if seen >= images:
                    return
            if seen == before:
                raise ConfigError("router input: the training data give no batch to standardise it by")

    # Each process has seen images of its own: the first one's figures hold for all.
    statistics = trainer.strategy.broadcast(score_statistics(estimator, degraded(), minimum=2))
    context.set_standardization(*(value.to(generator.device) for value in statistics))
    rank_zero_info(f"router input standardised over at least {images} degraded images")
