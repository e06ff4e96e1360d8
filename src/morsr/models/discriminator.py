"""Discriminators: trained heads on several levels of the frozen diffusion UNet, or on the decoded image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import active_adapters
from morsr.errors import ConfigError, check_fields, class_at
from morsr.functional.adversarial import hinge_discriminator, hinge_generator
from morsr.functional.precision import without_autocast
from morsr.models.bases import Base
from morsr.models.draws import Draws


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Settings of the discriminator; the paper leaves them open.

    Args:
        sees: "latents", features of the frozen UNet as in the paper, or "image", the decoded image itself: for a base
            whose features tell little of texture, such as `tiny`.
        width: channels within a head.
        max_timestep: latents are noised to a timestep from 0 to this one, so that the features stay informative.
        lr: learning rate of the heads.
        head: makes the head of a level of latent features from its channels: (B, channels, h, w) to verdicts
            (B, 1, h, w); None for two small convolutions of `width`.

    Raises:
        ConfigError: a setting outside its range.
    """

    sees: Literal["latents", "image"] = "latents"
    width: int = 64
    max_timestep: int = 200
    lr: float = 5e-5
    head: Callable[[int], nn.Module] | None = None

    def __post_init__(self) -> None:
        check_fields(self, least={"width": 1})
        if self.sees == "image" and self.max_timestep != type(self).max_timestep:
            raise ConfigError("discriminator.max_timestep: no effect where sees is image, which is not noised")
        if self.max_timestep > 999:
            raise ConfigError(f"discriminator.max_timestep: expected 0 to 999, got {self.max_timestep}")


class Discriminator(nn.Module):
    """One small head per level of the base's features; each judges every place of its level.

    The generator's base runs without adapters, in the state it was pretrained to. Only the heads are trained and owned.

    Source: hinge loss of Geometric GAN (arXiv 1705.02894); diffusion features as in LADD (arXiv 2403.12015).
    """

    sees: ClassVar[str] = "latents"

    def __init__(self, base: Base, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self._base = (base,)  # in a tuple: a submodule would be registered and saved a second time
        # jsonargparse leaves the class of a nested setting as its path.
        head = class_at(config.head, "losses.gan.head") if isinstance(config.head, str) else config.head
        make: Any = head or functools.partial(_head, width=config.width)
        self.heads = nn.ModuleList(make(channels) for channels in base.feature_widths)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Verdicts (B, 1, h, w) of every level, above 0 for real."""
        dtype = next(self.heads.parameters()).dtype
        return [head(level.to(dtype)) for head, level in zip(self.heads, features, strict=True)]

    def features(self, latents: Tensor, draws: Draws, *names: str) -> list[Tensor]:
        """Features of latents, noised to a small random timestep each first; a name of draws for every len(draws)."""
        base = self._base[0]
        timesteps = torch.cat([draws.timesteps(f"{name}/t", 0, self.config.max_timestep) for name in names])
        noise = torch.cat([draws.normal(f"{name}/noise", tuple(latents.shape[1:])) for name in names])
        with active_adapters(base, None):
            return base.features(base.noised(latents, noise, timesteps), timesteps)

    def generator_loss(self, latents: Tensor, draws: Draws) -> Tensor:
        """What the generator minimises: −D. The caller sees to it that the heads take no gradient (`toggled`)."""
        return hinge_generator(self(self.features(latents, draws, "adversarial")))

    def loss(self, fake: Tensor, real: Tensor, draws: Draws) -> Tensor:
        """What the heads minimise, for generated and real latents; both are detached here."""
        # One pass over both halves; the base runs without gradient, so only the heads' activations are kept.
        with torch.no_grad():
            features = self.features(torch.cat([fake, real]), draws, "fake", "real")
        verdicts, count = self(features), len(fake)
        return hinge_discriminator([v[count:] for v in verdicts], [v[:count] for v in verdicts])


class ImageDiscriminator(nn.Module):
    """Two stacks of convolutions that judge overlapping patches, of the image and of the image at half its size.

    The convolutions are divided by their largest singular value, found anew in each pass, so that there is no state
    beside the weights.

    Source: PatchGAN (arXiv 1611.07004), spectral normalisation (arXiv 1802.05957), several sizes as in pix2pixHD
    (arXiv 1711.11585).
    """

    sees: ClassVar[str] = "image"

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(_patches(config.width) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Verdicts (B, 1, h / 4, w / 4) and of half the size, above 0 for real, of images (B, 3, h, w) in [0, 1]."""
        with without_autocast(images.device):
            sizes = [images.float() * 2 - 1]
            sizes.append(F.avg_pool2d(sizes[0], 2, ceil_mode=True))
            return [head(size) for head, size in zip(self.heads, sizes, strict=True)]

    def generator_loss(self, images: Tensor, draws: Draws) -> Tensor:
        """What the generator minimises: −D. The caller sees to it that the heads take no gradient (`toggled`)."""
        return hinge_generator(self(images))

    def loss(self, fake: Tensor, real: Tensor, draws: Draws) -> Tensor:
        """What the heads minimise, for generated and real images; both are detached here."""
        return hinge_discriminator(self(real.detach()), self(fake.detach()))


def build_discriminator(base: Base, config: DiscriminatorConfig) -> Discriminator | ImageDiscriminator:
    """The discriminator that the settings ask for."""
    return Discriminator(base, config) if config.sees == "latents" else ImageDiscriminator(config)


class _SpectralConv(nn.Conv2d):
    """A convolution whose weight, as a matrix, has 1 as its largest singular value."""

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        square = torch.linalg.eigvalsh(matrix @ matrix.T)[-1]
        return self._conv_forward(input, self.weight / square.clamp(min=1e-12).sqrt(), self.bias)


def _patches(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    double = 2 * width
    for inner, outer, stride in ((3, width, 2), (width, double, 2), (double, double, 1), (double, double, 1)):
        kernel = 4 if stride == 2 else 3
        layers += [_SpectralConv(inner, outer, kernel, stride=stride, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, _SpectralConv(double, 1, 1))


def _head(channels: int, width: int) -> nn.Module:
    groups = next(groups for groups in (8, 4, 2, 1) if width % groups == 0)
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, 1, 1),
    )
