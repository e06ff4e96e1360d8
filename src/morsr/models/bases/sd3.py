"""Stable Diffusion 3 and 3.5: an MM-DiT over 16 latent channels, with tokens and a pooled vector of text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from morsr.models.bases.base import Architecture, Condition
from morsr.models.bases.flow import Flow
from morsr.models.bases.stable_diffusion import SD_VAE

SHIFTED_VAE: dict[str, Any] = {
    **SD_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Stable Diffusion 3's autoencoder; FLUX.1 and Z-Image have the same layers."""
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_SD35: dict[str, Any] = {
    **_SD3,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


class StableDiffusion3(Flow):
    """SD3Transformer2DModel with an AutoencoderKL that scales and shifts; see `Flow`."""

    network_class = "SD3Transformer2DModel"
    pipeline = "StableDiffusion3Pipeline"
    targets = ("sd3@transformer",)
    pooled = True
    published = (
        Architecture("sd3", _SD3, SHIFTED_VAE, 333, 4096, 2048, {"shift": 3.0}),
        Architecture("sd35-medium", _SD35, SHIFTED_VAE, 333, 4096, 2048, {"shift": 3.0}),
    )

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.transformer(
            z_t, encoder_hidden_states=condition.tokens, pooled_projections=condition.pooled, timestep=sigma * 1000
        ).sample
