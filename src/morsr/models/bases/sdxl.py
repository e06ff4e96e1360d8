"""Stable Diffusion XL: a UNet that wants a pooled text vector and the image's size too."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from morsr.models.bases.base import Architecture, Condition, dtype_of
from morsr.models.bases.stable_diffusion import SD_VAE, StableDiffusion

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


class StableDiffusionXL(StableDiffusion):
    """SDXL's UNet; the time ids say that the picture is whole, of the size of the latents."""

    pipeline = "StableDiffusionXLPipeline"
    parametrizations = ("epsilon",)
    pooled = True
    published: ClassVar[tuple[Architecture, ...]] = (
        Architecture("sdxl", _SDXL_UNET, {**SD_VAE, "scaling_factor": 0.13025}, 77, 2048, 1280),
    )

    def extra(self, z_t: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.pooled is not None
        height, width = (side * self.latent_factor for side in z_t.shape[-2:])
        sizes = z_t.new_tensor([height, width, 0, 0, height, width], dtype=condition.pooled.dtype)
        pooled = condition.pooled.to(dtype_of(self.unet)).expand(len(z_t), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(z_t), -1)}}
