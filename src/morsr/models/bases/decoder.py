"""The last upsampling of a small decoder, exact and cheaper: one convolution before it stands for two after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.functional.precision import without_autocast


class PhaseDecoder(nn.Sequential):
    """Layers of a DecoderTiny whose last three are a nearest ×2 upsampling and two 3×3 convolutions without activation.

    Together these are linear: every output pixel is a 3×3 window of the small map, by weights that depend on its
    place in its 2×2 block only. So one convolution gives four images, which a pixel shuffle joins. Keys of the weights
    stay, and adapters on one of the two convolutions make them run as they are.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        *first, upsample, inner, outer = self
        for layer in first:
            hidden = layer(hidden)

        def plain(part: Tensor) -> Tensor:
            return outer(inner(upsample(part)))

        if type(inner) is not nn.Conv2d or type(outer) is not nn.Conv2d:
            return plain(hidden)
        with without_autocast(hidden.device):
            weight = phase_weight(inner.weight, outer.weight).to(hidden.dtype)
        bias = None if outer.bias is None else outer.bias.repeat_interleave(4)
        image = F.pixel_shuffle(F.conv2d(hidden, weight, bias, padding=1), 2)
        # The outermost pixels see the zeros around the inner convolution's output.
        image[..., :1, :] = plain(hidden[..., :2, :])[..., :1, :]
        image[..., -1:, :] = plain(hidden[..., -2:, :])[..., -1:, :]
        image[..., :1] = plain(hidden[..., :2])[..., :1]
        image[..., -1:] = plain(hidden[..., -2:])[..., -1:]
        return image


def phase_weight(inner: Tensor, outer: Tensor) -> Tensor:
    """Weights (4 O, I, 3, 3) of the convolution that, before a pixel shuffle by 2, stands for a nearest ×2 upsampling
    and convolutions by inner (M, I, 3, 3) and outer (O, M, 3, 3)."""
    both = F.conv2d(inner.float().transpose(0, 1), outer.float().flip(-2, -1), padding=2).transpose(0, 1)
    taps = both.new_zeros(2, 5, 3)  # by place in the block: which of the 3 small pixels a tap of the 5 reads
    for place in range(2):
        for tap in range(5):
            taps[place, tap, (place + tap - 2) // 2 + 1] = 1
    return torch.einsum("oide,adr,bes->oabirs", both, taps, taps).flatten(0, 2)


def with_phases(vae: Any) -> Any:
    """The autoencoder, its decoder as a `PhaseDecoder` where that is the same."""
    layers = list(getattr(vae.decoder, "layers", []))
    settings = [(layer.mode, layer.scale_factor) for layer in layers[-3:-2] if isinstance(layer, nn.Upsample)]
    if settings == [("nearest", 2)]:
        vae.decoder.layers = PhaseDecoder(*layers)
    return vae
