"""Sana: linear attention over latents of 32 x 32 pixels, one token each, by a deep-compression autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from morsr.models.bases.base import Architecture, Condition
from morsr.models.bases.flow import Flow

_SANA_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_SANA_SCALES = ((), (), (), (5,), (5,), (5,))
_SANA_VAE: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": _SANA_BLOCKS,
    "decoder_block_types": _SANA_BLOCKS,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": _SANA_SCALES,
    "decoder_qkv_multiscales": _SANA_SCALES,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}


class Sana(Flow):
    """SanaTransformer2DModel with an AutoencoderDC, which has no distribution to take the mean of."""

    network_class = "SanaTransformer2DModel"
    autoencoders = ("AutoencoderDC",)
    pipeline = "SanaPipeline"
    text_width = "caption_channels"
    patch = 1
    targets = ("sana@transformer",)
    published = (Architecture("sana", {"caption_channels": 2304}, _SANA_VAE, 300, 2304, settings={"shift": 3.0}),)

    @classmethod
    def embedded(cls, output: Any) -> Condition:
        tokens, mask = output[:2]
        return Condition(tokens[mask.bool()][None])  # padding left out rather than masked

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        time = sigma * 1000 * self.transformer.config.timestep_scale
        return self.transformer(z_t, encoder_hidden_states=condition.tokens, timestep=time).sample
