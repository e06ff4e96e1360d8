"""Training of the learned degradation estimator on degradations whose parameters are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.degradation import true_severity
from morsr.errors import ConfigError, InputError
from morsr.estimators.learned import NAMES, DegradationNet, crop_statistics, save_net
from morsr.functional.utilization import spearman
from morsr.training.base_phases import SeededTraining
from morsr.training.optim import total_steps

STANDARDIZED = 1024  # images whose statistics standardise the network's input


class LearnedEstimatorTraining(SeededTraining):
    """Trains a DegradationNet to tell the ranks of blur, noise, JPEG and resize, and their mean.

    The data module's recipe should degrade a share of the images in one way only, some of them slightly, as
    `realesrgan_single` does; else the network does not learn what clean is.

    Args:
        hidden: width of the network.
        dropout: of its first layer.
        replay: how many earlier images are learned again beside every new one. Degrading an image costs far more than
            learning from it, since its statistics are kept.
        pool: how many earlier images are kept; checkpoints hold them.
        fill: share of the run, at its start, that only fills the pool. Without it the earliest images are learned ten
            times as often as the last ones, and the network remembers them.
        settings: `out`, and those of the optimizer and the seed, see `SeededTraining`; the schedule starts after the
            fill.
    """

    def __init__(
        self,
        *,
        hidden: PositiveInt = 512,
        dropout: ClosedUnitInterval = 0.3,
        replay: NonNegativeInt = 31,
        pool: PositiveInt = 20_000,
        fill: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.replay, self.pool, self.fill = replay, pool, fill
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.standardized: Tensor
        self.register_buffer("standardized", torch.tensor(0))
        self.net = DegradationNet(hidden=hidden, dropout=dropout)
        self._validation: list[tuple[Tensor, Tensor]] = []

    def trained(self) -> list[dict[str, Any]]:
        return [{"params": list(self.net.parameters())}]

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """True ranks (B, 5) of blur, noise, JPEG and resize, and their mean."""
        if "parameters" not in batch:
            raise InputError("the estimator learns from known parameters: give folders of sharp images, not pairs")
        ranks = torch.stack(
            true_severity(batch["parameters"], scale=batch["hr"].shape[-1] // batch["lr"].shape[-1])[:4], dim=1
        )
        return torch.cat([ranks, ranks.mean(dim=1, keepdim=True)], dim=1).to(batch["lr"].device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        lr, targets = batch["lr"], self.targets(batch)
        filling = self.global_step < self.waiting
        count = 0 if filling else self.replay * len(lr)
        statistics, ranks = self._with_earlier(crop_statistics(lr), targets, count)
        if filling:
            return None
        if int(self.standardized) < STANDARDIZED:
            self.net.set_standardization(torch.stack([known for known, _ in self._seen]))
            self.standardized.fill_(len(self._seen))
        loss = F.mse_loss(self.net(statistics), ranks)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(ranks))
        return loss

    def _with_earlier(self, statistics: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Statistics and targets: those of the batch, which go into the pool, and `count` earlier ones."""
        fresh = list(zip(statistics, targets, strict=True))
        chosen = [self._seen[place] for place in torch.randperm(len(self._seen))[:count].tolist()]
        for item in fresh:  # a full pool forgets at random
            if len(self._seen) < self.pool:
                self._seen.append(item)
            else:
                self._seen[int(torch.randint(self.pool, ()))] = item
        known, ranks = (torch.stack(parts) for parts in zip(*fresh, *chosen, strict=True))
        return known, ranks

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pool"] = [torch.stack(part).cpu() for part in zip(*self._seen, strict=True)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seen = list(zip(*(part.unbind() for part in checkpoint["pool"]), strict=True))

    def on_train_start(self) -> None:
        self._seen = [(known.to(self.device), ranks.to(self.device)) for known, ranks in self._seen]

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._validation.append((self.net(crop_statistics(batch["lr"])).cpu(), self.targets(batch).cpu()))

    def on_validation_epoch_end(self) -> None:
        if self._validation:
            # NaN where the estimator gives all images the same score, or there are fewer than three: no correlation
            found, truth = (torch.cat(parts) for parts in zip(*self._validation, strict=True))
            for index, name in enumerate(NAMES):
                self.log(f"val/spearman_{name}", spearman(found[:, index], truth[:, index]), prog_bar=name == "overall")
        self._validation.clear()

    def configure_optimizers(self) -> Any:
        if self.trainer.world_size > 1:
            raise ConfigError("trainer.devices: expected 1, since the pool of earlier images is one process's")
        steps = total_steps(self.trainer)
        self.waiting = max(0, min(round(self.fill * steps), steps - 1))
        return super().configure_optimizers()

    def write(self) -> None:
        save_net(self.out, self.net)
        rank_zero_info(f"estimator written to {self.out}")
