"""FLUX.1: 2 x 2 of 16 latent channels packed into tokens, with tokens and a pooled vector of text."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from morsr.models.bases.base import Architecture, Condition
from morsr.models.bases.flow import Flow
from morsr.models.bases.sd3 import SHIFTED_VAE

FLUX_VAE: dict[str, Any] = {**SHIFTED_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
GUIDANCE = 3.5
"""Guidance that the embedding of FLUX.1-dev is given, as its pipeline does; schnell has no such embedding."""


class Flux1(Flow):
    """FluxTransformer2DModel with an AutoencoderKL that scales and shifts; both published models are distilled."""

    network_class = "FluxTransformer2DModel"
    pipeline = "FluxPipeline"
    targets = ("flux1@transformer",)
    pooled = True
    distilled = True
    published = (Architecture("flux1", {"guidance_embeds": True}, FLUX_VAE, 512, 4096, 768, {"shift": 3.158}),)

    @classmethod
    def embedded(cls, output: Any) -> Condition:
        tokens, pooled, _ = output
        return Condition(tokens, pooled)

    @property
    def in_channels(self) -> int:
        return super().in_channels // 4

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        rows, columns = z_t.shape[-2] // 2, z_t.shape[-1] // 2
        places = torch.cartesian_prod(*(torch.arange(side, device=z_t.device) for side in (1, rows, columns)))
        guided = self.transformer.config.guidance_embeds
        output = self.transformer(
            rearrange(z_t, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            encoder_hidden_states=condition.tokens,
            pooled_projections=condition.pooled,
            timestep=sigma,
            img_ids=places,
            txt_ids=places.new_zeros(condition.tokens.shape[1], 3),
            guidance=torch.full_like(sigma, GUIDANCE) if guided else None,
        ).sample
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
