"""Z-Image: one stream of image and text tokens; its network gives z0 − n, at a time that runs from noise to image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from morsr.models.bases.base import Architecture, Condition
from morsr.models.bases.flow import Flow
from morsr.models.bases.flux1 import FLUX_VAE


class ZImage(Flow):
    """ZImageTransformer2DModel with FLUX.1's autoencoder; it takes lists, one entry per image."""

    network_class = "ZImageTransformer2DModel"
    pipeline = "ZImagePipeline"
    text_width = "cap_feat_dim"
    targets = ("z_image@transformer",)
    published = (Architecture("z-image", {}, FLUX_VAE, 512, 2560, settings={"shift": 3.0}),)
    last_layer = "all_final_layer.2-1.linear"
    block_lists = ("layers",)
    image_first = True

    @classmethod
    def embedded(cls, output: Any) -> Condition:
        (tokens,), _ = output  # a list of one prompt, without padding
        return Condition(tokens[None])

    def velocity(self, z_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        output = self.transformer(list(z_t.unsqueeze(2)), 1 - sigma, list(condition.tokens)).sample
        return -torch.stack(output).squeeze(2)
