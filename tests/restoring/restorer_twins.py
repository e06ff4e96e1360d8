"""Generators small enough to run in milliseconds: a real one with random weights, and fakes with known behaviour."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from morsr.adapters import MoRConfig
from morsr.estimators import DegradationEstimator
from morsr.models.bases import build_base
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.restoring import Restorer


def photo(
    path: Path | str, size: tuple[int, int] = (24, 16), *, mode: str = "RGB", low: int = 0, high: int = 256
) -> Path:
    """Write an image of random colours, which its name decides, with the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(sum(path.name.encode())).integers(low, high, (*size[::-1], 3), np.uint8)
    Image.fromarray(colours).convert(mode).save(path)
    return path


class MeanEstimator(DegradationEstimator):
    """Scores an image by its mean and its deviation."""

    names = ("mean", "deviation")

    def estimate(self, lr: Tensor) -> Tensor:
        return torch.stack([lr.mean(dim=(1, 2, 3)), lr.flatten(1).std(dim=1, unbiased=False)], dim=1)


class FakeGenerator(nn.Module):
    """The generator's face over any function of images; sees which sizes came."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.adapters = function, None
        self.base, self.one_step = SimpleNamespace(latent_factor=4, multiple=16), OneStepConfig()
        self.sizes: list[tuple[int, int]] = []

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape[-1] % 16 == images.shape[-2] % 16 == 0
        self.sizes.append((images.shape[-2], images.shape[-1]))
        return images

    def denoise(self, latents: Tensor) -> Tensor:
        return self.function(latents)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def smoothing(images: Tensor) -> Tensor:
    """A convolution that sees beyond a tile's border, as networks do."""
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    return F.avg_pool2d(padded, 7, stride=1)


def fake(function: Callable[[Tensor], Tensor] = lambda images: images) -> Restorer:
    return Restorer(FakeGenerator(function), device="cpu")  # type: ignore[arg-type]


MIXTURE = MoRConfig(num_ranks=12, num_shared=4, top_k=3, num_zero=2, targets=("sd_unet@unet",))


def small_generator(*, adapters: bool = True) -> OneStepGenerator:
    """A diffusers UNet and AutoencoderTiny with random weights, and adapters that change the output."""
    return copy.deepcopy(_built(adapters))


@functools.cache
def _built(adapters: bool) -> OneStepGenerator:
    torch.manual_seed(0)
    unet = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8, "norm_num_groups": 4,
    }  # fmt: skip
    vae = {
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 4,
        "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1),
    }  # fmt: skip
    generator = OneStepGenerator(
        build_base(unet, vae), MeanEstimator() if adapters else None, adapters=MIXTURE if adapters else None,
        one_step=OneStepConfig(timestep=250, scale_input=True),
    )  # fmt: skip
    if adapters:
        generator.adapters.router.standardize(torch.tensor([0.5, 0.25]), torch.tensor([0.05, 0.05]))
        for name, parameter in generator.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
        for parameter in (generator.adapters.router.weight, generator.adapters.router.bias):
            nn.init.normal_(parameter)
    return generator.eval()
