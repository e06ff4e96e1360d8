"""Shapes of the published networks, to build them with random weights: for tests, benchmarks and dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from morsr.errors import ConfigError


class Architecture(NamedTuple):
    """Shapes of a published model.

    family: class of the base. network, vae: settings of diffusers' classes. tokens, width: of a prompt. pooled: width
    of the pooled text vector. settings: further arguments of the family. distilled: whether it takes no guidance.
    """

    family: str
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    tokens: int
    width: int
    pooled: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})
    distilled: bool = False


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

_SD15_UNET: dict[str, Any] = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
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
_SD3_VAE: dict[str, Any] = {
    **_SD_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_KLEIN: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

_FLUX_VAE: dict[str, Any] = {**_SD3_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
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

# SD-Turbo is SD 2.1 distilled: its networks have the same shapes.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture("StableDiffusion", _SD15_UNET, _SD_VAE, 77, 768),
    "sd21": Architecture("StableDiffusion", _SD21_UNET, _SD_VAE, 77, 1024),
    "sd-turbo": Architecture("StableDiffusion", _SD21_UNET, _SD_VAE, 77, 1024),
    "sdxl": Architecture("StableDiffusionXL", _SDXL_UNET, {**_SD_VAE, "scaling_factor": 0.13025}, 77, 2048, 1280),
    "sd3": Architecture("StableDiffusion3", _SD3, _SD3_VAE, 333, 4096, 2048, {"shift": 3.0}),
    "sd35-medium": Architecture("StableDiffusion3", _SD35, _SD3_VAE, 333, 4096, 2048, {"shift": 3.0}),
    "flux2-klein": Architecture("Flux2", _KLEIN, {}, 512, 7680, settings={"shift": 3.158}, distilled=True),
    "flux1": Architecture("Flux1", {"guidance_embeds": True}, _FLUX_VAE, 512, 4096, 768, {"shift": 3.158}, True),
    "z-image": Architecture("ZImage", {}, _FLUX_VAE, 512, 2560, settings={"shift": 3.0}),
    "sana": Architecture("Sana", {"caption_channels": 2304}, _SANA_VAE, 300, 2304, settings={"shift": 3.0}),
    "small": Architecture("StableDiffusion", _SMALL_UNET, _SMALL_VAE, 7, 32),
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
