"""Features of the frozen base model: of its autoencoder for a perceptual loss, of its UNet for a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters import AdaptedLayer
from morsr.models.backbone import Backbone


def encoder_features(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """What the autoencoder's encoder holds before each halving of the size and before its last convolution.

    Args:
        backbone: whose encoder runs, with whatever adapter set is active.
        images: (B, 3, H, W), nominally in [0, 1]; not clamped.

    Returns:
        One tensor (B, C, h, w) per level, the finest first.
    """
    encoder = backbone.vae.encoder
    convolutions = _convolutions(encoder)
    watched = [layer for layer in convolutions if max(layer.stride) > 1]
    watched += [convolutions[-1]] if convolutions[-1] not in watched else []
    found: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for layer in watched]
    try:
        encoder((images * 2 - 1).to(next(encoder.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _convolutions(module: nn.Module) -> list[Any]:
    """The convolutions of a network in the order they are registered, adapted ones as their wrappers."""
    found: list[Any] = []
    for child in module.children():
        inner = child.base_layer if isinstance(child, AdaptedLayer) else child
        if isinstance(inner, nn.Conv2d):
            found.append(child)
        elif not isinstance(child, AdaptedLayer):
            found += _convolutions(child)
    return found


def diffusion_features(
    backbone: Backbone, latents: Tensor, timesteps: Tensor, prompt: Tensor | None = None
) -> list[Tensor]:
    """What the UNet holds after each of its down blocks and after its middle block; its up path does not run.

    Args:
        backbone: whose UNet runs, with whatever adapter set is active.
        latents: z_t (B, C, h, w).
        timesteps: (B,).
        prompt: (1 or B, T, width); default the "clean" one.

    Returns:
        One tensor (B, C, h, w) per down block, then the middle block's.
    """
    unet = backbone.unet
    dtype = unet.conv_in.weight.dtype
    prompt = backbone.prompt_clean if prompt is None else prompt
    states = prompt.to(dtype).expand(len(latents), -1, -1)
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
    hidden = unet.conv_in(latents.to(dtype))
    found = []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        context = {"encoder_hidden_states": states} if attends else {}
        hidden, _ = block(hidden_states=hidden, temb=embedding, **context)
        found.append(hidden)
    attends = getattr(unet.mid_block, "has_cross_attention", False)
    context = {"encoder_hidden_states": states} if attends else {}
    found.append(unet.mid_block(hidden, embedding, **context))
    return found


@torch.no_grad()
def feature_widths(backbone: Backbone) -> list[int]:
    """Channels of every level that `diffusion_features` gives."""
    widths = list(backbone.unet.config.block_out_channels)
    return [*widths, widths[-1]]
