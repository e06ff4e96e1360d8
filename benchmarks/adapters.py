"""Adapters against named peers: one image over the bare base, and a training step over peft's LoRA of rank 40.

    python benchmarks/adapters.py image|step [--base random:sd21] [--size 512] [--rounds 9]

`image`: one image through the whole pass, autoencoder, estimator, router and merge included, over the same base without
adapters. `step`: forward and backward of the UNet, ranks of one image each, over peft's LoRA on the same layers; with
the memory of one step above the weights. Weights are random in the true shapes: they do not change the time.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import auto_cli
from timing import compare, peak_megabytes, print_table
from torch import nn

from morsr.adapters import MoRConfig
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator
from morsr.restoring import Restorer

TARGETS = ("sd_unet@unet", "sd_vae_encoder@vae")


def generator(base: str, targets: tuple[str, ...], dtype: torch.dtype = torch.float32) -> OneStepGenerator:
    """A generator on a base, with 40 ranks on these targets; without adapters if there are none."""
    config, estimator = (MoRConfig(targets=targets), build_estimator("frequency")) if targets else (None, None)
    return OneStepGenerator(load_base(base, dtype=dtype), estimator, adapters=config).eval()


def image(base: str = "random:sd21", size: int = 512, rounds: int = 9) -> dict[str, Any]:
    """One image, everything counted, over the bare base."""
    lr = torch.rand(1, 3, size // 4, size // 4)
    adapted, bare = (Restorer(generator(base, targets)) for targets in (TARGETS, ()))
    found = compare(lambda: adapted(lr, tile=None), lambda: bare(lr, tile=None), rounds=rounds)
    return {"what": f"one image of {size}², adapters over bare", **found._asdict()}


def step(base: str = "random:sd21", size: int = 512, rounds: int = 9) -> dict[str, Any]:
    """A training step of the UNet over peft's LoRA of the same rank on the same layers."""
    from peft import LoraConfig, inject_adapter_in_model

    ours, bare = generator(base, TARGETS[:1]).train(), generator(base, ())
    unet = ours.base.unet
    layers = [name.removesuffix(".base_layer") for name, _ in unet.named_modules() if name.endswith(".base_layer")]
    peer = inject_adapter_in_model(LoraConfig(r=40, target_modules=layers), bare.base.unet)
    side = size // ours.base.latent_factor
    latents, text = torch.randn(1, 4, side, side), torch.randn(1, 77, unet.config.cross_attention_dim)

    def once(network: nn.Module) -> None:
        network(latents, 999, text).sample.square().mean().backward()

    def own() -> None:
        ours.route(torch.rand(1, 3, size // 4, size // 4))
        once(unet)

    found = compare(own, lambda: once(peer), rounds=rounds)
    memory = [peak_megabytes(call, torch.device("cpu")) for call in (own, lambda: once(peer))]
    return {"what": f"step, {size}², over peft LoRA", **found._asdict(), "memory ratio": memory[0] / memory[1]}


if __name__ == "__main__":
    print_table([auto_cli([image, step])])
