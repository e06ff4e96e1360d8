"""Stable Diffusion 3 and 3.5: an MM-DiT over 16 latent channels, with tokens and a pooled vector of text."""

from __future__ import annotations

from torch import Tensor

from morsr.models.bases.base import Condition
from morsr.models.bases.flow import Flow


class StableDiffusion3(Flow):
    """SD3Transformer2DModel with an AutoencoderKL that scales and shifts; see `Flow`."""

    network_class = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    text_pipeline = "StableDiffusion3Pipeline"
    targets = ("sd3@transformer",)
    pooled = True

    def tokens_shape(self, z_t: Tensor) -> tuple[int, int]:
        patch = self.transformer.config.patch_size
        return z_t.shape[-2] // patch, z_t.shape[-1] // patch

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.transformer(
            z_t, encoder_hidden_states=condition.tokens, pooled_projections=condition.pooled, timestep=sigma * 1000
        ).sample
