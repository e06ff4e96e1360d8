"""A discriminator of latents: trained heads on several levels of the frozen diffusion UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morsr.adapters import active_adapters
from morsr.errors import ConfigError
from morsr.functional.adversarial import hinge_discriminator, hinge_generator
from morsr.functional.diffusion import add_noise
from morsr.models.backbone import Backbone
from morsr.models.draws import Draws
from morsr.models.features import diffusion_features, feature_widths


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Settings of the discriminator; the paper leaves them open.

    Args:
        width: channels within a head.
        max_timestep: latents are noised to a timestep from 0 to this one, so that the features stay informative.
        lr: learning rate of the heads.

    Raises:
        ConfigError: a setting outside its range.
    """

    width: int = 64
    max_timestep: int = 200
    lr: float = 5e-5

    def __post_init__(self) -> None:
        if self.width < 1 or not 0 <= self.max_timestep <= 999 or self.lr <= 0:
            raise ConfigError(
                f"discriminator: expected width >= 1, max_timestep in 0..999, lr > 0, got {self.width}, "
                f"{self.max_timestep}, {self.lr}"
            )


class Discriminator(nn.Module):
    """One small head per level of the UNet's down path and its middle; each judges every place of its level.

    The UNet runs without adapters, in the state it was pretrained to. Only the heads are trained and owned here.

    Args:
        backbone: shared with the generator; not owned.
        config: widths and noise.

    Source: hinge loss of Geometric GAN (arXiv 1705.02894); diffusion features as in LADD (arXiv 2403.12015).
    """

    def __init__(self, backbone: Backbone, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self._backbone = (backbone,)  # in a tuple: a submodule would be registered and saved a second time
        self.heads = nn.ModuleList(_head(channels, config.width) for channels in feature_widths(backbone))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Verdicts (B, 1, h, w) of every level, above 0 for real."""
        dtype = next(self.heads.parameters()).dtype
        return [head(level.to(dtype)) for head, level in zip(self.heads, features, strict=True)]

    def judge(self, latents: Tensor, draws: Draws, name: str) -> list[Tensor]:
        """Verdicts on latents (B, C, h, w), noised to a small random timestep first."""
        backbone = self._backbone[0]
        timesteps = draws.timesteps(f"{name}/t", 0, self.config.max_timestep)
        noise = draws.normal(f"{name}/noise", tuple(latents.shape[1:]))
        noisy = add_noise(latents, noise, backbone.alphas_cumprod[timesteps])
        with active_adapters(backbone, None):
            features = diffusion_features(backbone, noisy, timesteps)
        return self(features)

    def generator_loss(self, latents: Tensor, draws: Draws) -> Tensor:
        """What the generator minimises: −D. The caller sees to it that the heads take no gradient (`toggled`)."""
        return hinge_generator(self.judge(latents, draws, "adversarial"))

    def loss(self, fake: Tensor, real: Tensor, draws: Draws) -> Tensor:
        """What the heads minimise, for generated and real latents; both are detached here."""
        # One pass over both halves; the base runs without gradient, so only the heads' activations are kept.
        both = torch.cat([fake.detach(), real.detach()])
        backbone = self._backbone[0]
        timesteps = torch.cat([draws.timesteps(f"{side}/t", 0, self.config.max_timestep) for side in ("fake", "real")])
        noise = torch.cat([draws.normal(f"{side}/noise", tuple(fake.shape[1:])) for side in ("fake", "real")])
        with torch.no_grad(), active_adapters(backbone, None):
            noisy = add_noise(both, noise, backbone.alphas_cumprod[timesteps])
            features = diffusion_features(backbone, noisy, timesteps)
        verdicts = self(features)
        count = len(fake)
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
