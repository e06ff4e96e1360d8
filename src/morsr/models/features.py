"""Features of the frozen base model: of its autoencoder, for a perceptual loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from morsr.adapters import AdaptedLayer
from morsr.models.bases import Base


def encoder_features(base: Base, images: Tensor) -> list[Tensor]:
    """What the autoencoder's encoder holds before each halving of the size and before its last convolution.

    Args:
        base: whose encoder runs, with whatever adapter set is active.
        images: (B, 3, H, W), nominally in [0, 1]; not clamped.

    Returns:
        One tensor (B, C, h, w) per level, the finest first.
    """
    encoder = base.vae.encoder
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
