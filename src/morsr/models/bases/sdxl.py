"""Stable Diffusion XL: a UNet that wants a pooled text vector and the image's size too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from morsr.errors import ConfigError
from morsr.models.bases.base import Condition, dtype_of
from morsr.models.bases.stable_diffusion import StableDiffusion, check_kind


class StableDiffusionXL(StableDiffusion):
    """SDXL's UNet; the time ids say that the picture is whole, of the size of the latents."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    text_pipeline = "StableDiffusionXLPipeline"
    parametrizations = ("epsilon",)
    pooled = True

    @classmethod
    def check_unet(cls, folder: Path, config: Mapping[str, Any]) -> None:
        check_kind(folder, config)
        if config.get("addition_embed_type") != "text_time":
            raise ConfigError(
                f"{folder}: expected SDXL's UNet, got addition_embed_type {config.get('addition_embed_type')}"
            )

    def extra(self, z_t: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.pooled is not None
        height, width = (side * self.latent_factor for side in z_t.shape[-2:])
        sizes = z_t.new_tensor([height, width, 0, 0, height, width], dtype=condition.pooled.dtype)
        pooled = condition.pooled.to(dtype_of(self.unet)).expand(len(z_t), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(z_t), -1)}}
