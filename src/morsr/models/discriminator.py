"""The discriminator: trained heads on several levels of the frozen denoiser's features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters import active_adapters
from morsr.errors import ConfigError, check_fields, class_at
from morsr.functional.losses import hinge_discriminator, hinge_generator
from morsr.models.bases import Base
from morsr.models.draws import Draws


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Settings of the discriminator; the paper leaves them open.

    Args:
        width: channels within a head.
        max_timestep: latents are noised to a timestep from 0 to this one, so that the features stay informative.
        lr: learning rate of the heads.
        head: makes the head of a level of latent features from its channels: (B, channels, h, w) to verdicts
            (B, 1, h, w); None for two small convolutions of `width`.

    Raises:
        ConfigError: a setting outside its range.
    """

    width: int = 64
    max_timestep: int = 200
    lr: float = 5e-5
    head: Callable[[int], nn.Module] | None = None

    def __post_init__(self) -> None:
        check_fields(self, least={"width": 1})
        if self.max_timestep > 999:
            raise ConfigError(f"discriminator.max_timestep: expected 0 to 999, got {self.max_timestep}")


class Discriminator(nn.Module):
    """One small head per level of the base's features; each judges every place of its level.

    The generator's base runs without adapters, in the state it was pretrained to. Only the heads are trained and owned.

    Source: hinge loss of Geometric GAN (arXiv 1705.02894); diffusion features as in LADD (arXiv 2403.12015).
    """

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
