"""Features of the frozen base model: of its autoencoder, for a perceptual loss."""

from __future__ import annotations

from torch import Tensor, nn

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
    convolutions = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
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
