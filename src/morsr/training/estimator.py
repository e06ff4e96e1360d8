"""Training of the learned degradation estimator on degradations whose parameters are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from morsr.degradation import DegradationMeasures, DegradationRecipe, true_severity
from morsr.degradation.severity import measure_ranks
from morsr.errors import InputError
from morsr.estimators.learned import NAMES, DegradationNet, crop_statistics, save_net
from morsr.functional.corrupt import add_gaussian_noise, jpeg, resize
from morsr.functional.utilization import spearman
from morsr.training.base_phases import SeededTraining
from morsr.training.optim import total_steps

# One factor alone: blur sigma in LR pixels, noise sigma in levels of 255, JPEG quality.
FACTOR_RANGES = {"blur": (0.4, 2.0), "noise": (1.0, 30.0), "jpeg": (30.0, 95.0)}
FACTORS = ("clean", *FACTOR_RANGES)
STANDARDIZED = 1024  # images whose statistics standardise the network's input
_PLAIN_SPREAD = 0.0904  # variance that `degradation_measures` gives a plain area average, in squared LR pixels


def single_factor(hr: Tensor, factor: str, value: float, *, key: int, gray: bool = False) -> Tensor:
    """Shrink one image by area averages and degrade it in one way only.

    Args:
        hr: (1, 3, H, W) float32 in [0, 1].
        factor: one of FACTORS: "clean", "blur" (before shrinking), "noise" or "jpeg" (after it).
        value: sigma in LR pixels, sigma in levels of 255, or quality; "clean" reads none.
        key: seed of the noise, which is the same in all channels if `gray`.

    Returns:
        (1, 3, H // 4, W // 4) in [0, 1], whole multiples of 1/255.
    """
    scale, (height, width) = 4, (length // 4 for length in hr.shape[-2:])
    if factor == "blur":
        hr = gaussian_blur(hr, 2 * max(1, round(3 * scale * value)) + 1, scale * value)
    lr = resize(hr[..., : height * scale, : width * scale], (height, width), "area")
    if factor == "noise":
        generator = torch.Generator(device=lr.device).manual_seed(key & 0xFFFFFFFF)
        lr = add_gaussian_noise(lr, value, gray=gray, generator=generator)
    if factor == "jpeg":
        lr = jpeg(lr, torch.tensor([value]))
    return lr.mul(255).round_().clamp_(0, 255).div_(255)


def with_mean(ranks: Tensor) -> Tensor:
    """Ranks (B, 4) of blur, noise, JPEG and resize, and their mean: the targets (B, 5)."""
    return torch.cat([ranks, ranks.mean(dim=1, keepdim=True)], dim=1)


def single_factor_ranks(factor: str, value: float, recipe: DegradationRecipe | str = "realesrgan") -> Tensor:
    """Targets (1, 5) of an image with one factor, among a recipe's draws."""
    measured = {"blur": 0.0, "noise": 0.0, "jpeg": 100.0, "resize": 1.0}
    if factor in measured:
        measured[factor] = value
    measured["blur"] = math.sqrt(measured["blur"] ** 2 + _PLAIN_SPREAD)
    measures = DegradationMeasures(**{name: torch.tensor([number]).double() for name, number in measured.items()})
    return with_mean(measure_ranks(measures, recipe))


class LearnedEstimatorTraining(SeededTraining):
    """Trains a DegradationNet to tell the ranks of blur, noise, JPEG and resize, and their mean.

    A share of every batch is replaced by images with one factor alone, or none, made of the same HR crops: the recipe
    never leaves an image clean, and the network would otherwise not know what clean is.

    Args:
        out: file for the weights (.safetensors), written at the end.
        hidden: width of the network.
        dropout: of its first layer.
        recipe: recipe among whose draws the ranks are taken; the data module's own.
        single_share: share of images with a single factor or none.
        replay: how many earlier images are learned again beside every new one. Degrading an image costs far more than
            learning from it, since its statistics are kept.
        pool: how many earlier images are kept; checkpoints hold them.
        fill: share of the run, at its start, that only fills the pool. Without it the earliest images are learned ten
            times as often as the last ones, and the network remembers them.
        settings: of the optimizer and the seed, see `SeededTraining`; the schedule starts after the fill.
    """

    def __init__(
        self,
        *,
        out: str = "runs/estimator/estimator.safetensors",
        hidden: PositiveInt = 512,
        dropout: ClosedUnitInterval = 0.3,
        recipe: str = "realesrgan",
        single_share: ClosedUnitInterval = 0.3,
        replay: NonNegativeInt = 31,
        pool: PositiveInt = 20_000,
        fill: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.out, self.recipe, self.single_share = Path(out), recipe, single_share
        self.replay, self.pool, self.fill = replay, pool, fill
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.standardized: Tensor
        self.register_buffer("standardized", torch.tensor(0))
        self.net = DegradationNet(hidden=hidden, dropout=dropout)
        self._validation: list[tuple[Tensor, Tensor]] = []

    def trained(self) -> list[dict[str, Any]]:
        return [{"params": list(self.net.parameters())}]

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """True ranks (B, 5) of a batch's parameters, ordered as the network's outputs."""
        if "parameters" not in batch:
            raise InputError("the estimator learns from known parameters: give folders of sharp images, not pairs")
        ranks = torch.stack(true_severity(batch["parameters"], self.recipe)[:4], dim=1)
        return with_mean(ranks).to(batch["lr"].device)

    @torch.no_grad()
    def mixed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, h, w) and targets (B, 5), the first ones replaced by images with a single factor."""
        lr, targets = batch["lr"].clone(), self.targets(batch)
        for place in range(round(self.single_share * len(lr))):
            factor = FACTORS[int(torch.randint(len(FACTORS), ()))]
            low, high = FACTOR_RANGES.get(factor, (0.0, 0.0))
            value, gray = low + (high - low) * float(torch.rand(())), float(torch.rand(())) < 0.4
            key = int(torch.randint(2**31, ()))
            lr[place] = single_factor(batch["hr"][place : place + 1], factor, value, key=key, gray=gray)[0]
            targets[place] = single_factor_ranks(factor, value, self.recipe)[0].to(targets)
        return lr, targets

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        lr, targets = self.mixed(batch)
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
        steps = total_steps(self.trainer)
        self.waiting = max(0, min(round(self.fill * steps), steps - 1))
        return super().configure_optimizers()

    def write(self) -> None:
        save_net(self.out, self.net)
        rank_zero_info(f"estimator written to {self.out}")
