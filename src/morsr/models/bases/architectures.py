"""What the shapes of a published model are, and the autoencoders that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """Shapes of a published model, to build it with random weights: for tests, benchmarks and dry runs.

    name: in `random:NAME`. network, vae: settings of diffusers' classes. tokens, width: of a prompt. pooled: width of
    the pooled text vector. settings: further arguments of the family. distilled: whether it takes no guidance.
    """

    name: str
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    tokens: int
    width: int
    pooled: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})
    distilled: bool = False


SD_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
"""Stable Diffusion's autoencoder."""

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
