"""FLUX.2 [klein]: 2 x 2 latents packed into tokens, normalised by the autoencoder's own statistics."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from morsr.models.bases.base import Architecture, Condition, dtype_of
from morsr.models.bases.flow import Flow

_KLEIN: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


class Flux2(Flow):
    """Flux2Transformer2DModel with an AutoencoderKLFlux2; latents are (B, 4 C, h / 2, w / 2), 128 channels."""

    network_class = "Flux2Transformer2DModel"
    autoencoders = ("AutoencoderKLFlux2",)
    pipeline = "Flux2KleinPipeline"
    distilled = True
    patch = 1
    targets = ("flux2@transformer",)
    published = (Architecture("flux2-klein", _KLEIN, {}, 512, 7680, settings={"shift": 3.158}),)

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    @property
    def latent_factor(self) -> int:
        """Pixels per packed latent, 16 for klein."""
        return 2 * super().latent_factor

    @property
    def scaling_factor(self) -> float:
        """1: each packed channel has its own mean and deviation."""
        return 1.0

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        deviation = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.float().view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        raw = self.vae.encode(images.to(dtype_of(self.vae))).latent_dist.mean
        mean, deviation = self._statistics()
        return (rearrange(raw, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2) - mean) / deviation

    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        raw = rearrange(latents * deviation + mean, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
        return self.vae.decode(raw.to(dtype_of(self.vae))).sample

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        rows, columns = z_t.shape[-2:]
        output = self.transformer(
            rearrange(z_t, "b c h w -> b (h w) c"),
            encoder_hidden_states=condition.tokens,
            timestep=sigma,
            img_ids=positions(rows, columns, 1, z_t.device),
            txt_ids=positions(1, 1, condition.tokens.shape[1], z_t.device),
        ).sample
        return rearrange(output, "b (h w) c -> b c h w", h=rows)


def positions(rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Places (n, 4) of tokens along time, rows, columns and text."""
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in (1, rows, columns, length)))
