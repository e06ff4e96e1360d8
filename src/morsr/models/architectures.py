"""Shapes of the published networks, to build them with random weights: for tests, benchmarks and dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from morsr.errors import ConfigError


class Architecture(NamedTuple):
    """Settings of a UNet2DConditionModel and of an autoencoder, and the number of tokens of a prompt."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    tokens: int


_SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SD_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
_SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "use_linear_projection": True,
}
_SMALL_VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}

TAESD: Mapping[str, Any] = {
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_channels": 4,
}
"""Settings of the AutoencoderTiny that decodes Stable Diffusion's latents (madebyollin/taesd)."""

# SD-Turbo is SD 2.1 distilled: its networks have the same shapes.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sd21": Architecture(_SD21_UNET, _SD_VAE, 77),
    "sd-turbo": Architecture(_SD21_UNET, _SD_VAE, 77),
    "small": Architecture(_SMALL_UNET, _SMALL_VAE, 7),
}
"""Known shapes by name; "small" has the same classes of layers in a network that a test can afford."""


def architecture(name: str) -> Architecture:
    """Look up an architecture.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"random base: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name]
