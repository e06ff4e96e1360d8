"""Batches in which every photograph comes twice, under two degradations."""

from typing import Any

import torch

from morsr.data import RealESRGANDataModule


class Paired(RealESRGANDataModule):
    """The second half of a training batch shows the windows of the first half, each with a degradation of its own."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = self._drawn(batch)
        if self.trainer is not None and self.trainer.training:
            first = slice(0, len(batch["kind"]) // 2)
            for name in ("hr", "key"):
                batch[name] = torch.cat([batch[name][first]] * 2)
            for name in ("kind", "windows"):
                batch[name] = batch[name][first] * 2
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
