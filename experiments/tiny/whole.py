"""Training of a small model whole: the base's own weights, ranks and router, with losses on structure and features."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.functional.losses import feature_distances
from morsr.functional.quality import rgb_to_y
from morsr.models.losses import LossTerm, TrainingStep
from morsr.models.metrics import ImageNetFeatures
from morsr.training.module import OneStepSRModule
from morsr.training.step import Network


class WholeModel(OneStepSRModule):
    """As `OneStepSRModule`, with the base's weights trained too, and written to `base/` beside the newest adapters.

    Args:
        base_lr: their learning rate.
        plain_every: every so many steps the input is the sharp image itself, or a half of it by turns; 0 for never.
        settings: those of `OneStepSRModule`.
    """

    def __init__(self, *, base_lr: float = 3e-4, plain_every: int = 0, **settings: Any) -> None:
        super().__init__(**settings, optimizers={"generator": self._optimizer})
        self.base_lr, self.plain_every = base_lr, plain_every

    def _base(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (item for item in self.generator.named_parameters() if item[0] in self._names)

    def configure_model(self) -> None:
        if "generator" not in self._modules:
            super().configure_model()
            mine = {id(one) for one in self.objective.trained()["generator"]}
            kept = {id(one) for one in self.generator.estimator.parameters()}
            self._names = {k for k, one in self.generator.named_parameters() if id(one) not in mine | kept}
            for _, parameter in self._base():
                parameter.requires_grad_(True)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if self.plain_every and self.global_step % self.plain_every == 0:
            scale = 1 + self.global_step // self.plain_every % 2
            lr = F.interpolate(batch["hr"], scale_factor=1 / scale, mode="area")
            batch = {**batch, "lr": lr, "score_lr": lr, "severity": torch.full((len(lr),), torch.nan, device=lr.device)}
        super().training_step(batch, batch_idx)

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        weights = {"params": [one for _, one in self._base()], "lr": self.base_lr, "name": "base"}
        settings = {key: self.optimizer_settings[key] for key in ("betas", "weight_decay")}
        return torch.optim.AdamW([*groups, weights], **settings)

    def build_networks(self, total_steps: int = -1) -> list[Network]:
        generator, *helpers = super().build_networks(total_steps)
        generator.parameters = [*generator.parameters, *(one for _, one in self._base())]
        return [generator, *helpers]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        return super().averaged_parameters() | dict(self._base())

    def _saved_tensors(self) -> dict[str, Tensor]:
        return super()._saved_tensors() | {f"generator.{name}": one for name, one in self._base()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["morsr"]["layers"] = []  # by which the base is known that a run goes on from: here it is inside

    def save_adapters(self, path: str | os.PathLike[str]) -> None:
        base = Path(path).absolute().parent / "base"
        self.generator.base.save(base)
        self.parts["base"] = str(base)  # where the file says that its base is
        super().save_adapters(path)


class ImageNetDistance(LossTerm):
    """Distance in the features of EfficientNet-Lite1 and Lite2, the images shifted by up to 7 pixels.

    The shift hides the networks' grids, to which a picture could otherwise be fitted (Kettunen et al., E-LPIPS, arXiv
    1906.03973). The metric `features` reads another network, Lite0.
    """

    def __init__(self, weight: float = 1.0, start: int = 0, ramp: int = 0, sizes: Sequence[int] = (1, 2)) -> None:
        super().__init__(weight, start, ramp)
        self.networks = nn.ModuleList(ImageNetFeatures(size).to(memory_format=torch.channels_last) for size in sizes)

    def forward(self, step: TrainingStep) -> Tensor:
        network = self.networks[step.step % len(self.networks)]
        top, left = torch.randint(8, (2,), generator=torch.Generator().manual_seed(step.step)).tolist()
        some = -(-len(step.sr) // 4)  # of the batch: the networks cost more than the rest of the step
        sr, hr = (images[:some, :, top:, left:] for images in (step.sr, step.hr))
        with torch.no_grad():
            target = network(hr)
        return feature_distances(network(sr), target).mean()


class Dissimilarity(LossTerm):
    """1 − SSIM on luma; Wang et al., IEEE TIP 2004, equation 13, with a Gaussian window of 11 pixels."""

    def forward(self, step: TrainingStep) -> Tensor:
        places = torch.arange(-5.0, 6.0, device=step.sr.device)
        window = torch.exp(-places.square() / (2 * 1.5**2))
        window = window / window.sum()
        with torch.autocast(step.sr.device.type, enabled=False):
            x, y = rgb_to_y(step.sr.float()), rgb_to_y(step.hr)
            maps = torch.cat([x, y, x * x + y * y, x * y], dim=1)
            for shape in ((1, 1, 11, 1), (1, 1, 1, 11)):
                maps = F.conv2d(maps, window.view(shape).expand(4, *shape[1:]), groups=4)
            mean_x, mean_y, power, product = maps.split(1, dim=1)
            means = mean_x.square() + mean_y.square()
            structure = (2 * (product - mean_x * mean_y) + 0.03**2) / (power - means + 0.03**2)
            return 1 - (structure * (2 * mean_x * mean_y + 0.01**2) / (means + 0.01**2)).mean()
