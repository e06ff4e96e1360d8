"""Networks with random weights for the adapter benchmark."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from morsr.functional.routing import Routing
from morsr.models.architectures import ARCHITECTURES
from morsr.models.backbone import build_backbone

UNETS = {name: ARCHITECTURES[name].unet for name in ("sd21", "small")}
_VAE: dict[str, Any] = {
    "encoder_block_out_channels": [4],
    "decoder_block_out_channels": [4],
    "num_encoder_blocks": [1],
    "num_decoder_blocks": [1],
}


def random_unet(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A UNet whose weights repeat one block of random numbers, for drawing a billion of them takes minutes."""
    with torch.device("meta"):
        unet = build_backbone(UNETS[name], _VAE).unet
    # Asked for float32, diffusers warns about layers that should stay in it.
    unet = unet if dtype == torch.float32 else unet.to(dtype)
    unet = unet.to_empty(device=device).requires_grad_(False).eval()
    block = torch.empty(2**20 + 1, device=device, dtype=dtype).uniform_(-1, 1)
    for key, parameter in unet.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if key.endswith("weight") else 0.0)
            continue
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            torch.mul(block[: len(part)], parameter[0].numel() ** -0.5, out=part)
    return unet


def routing_with_zeros(layers: int, slots: int, experts: int, top_k: int, zeros: int) -> Routing:
    """A routing of one image with even gates and so many zero slots in every layer."""
    places = [*range(top_k - zeros), *range(experts, experts + zeros)]
    chosen = torch.tensor(places).expand(layers, 1, top_k)
    selected = torch.ones(layers, 1, top_k)
    gates = torch.zeros(layers, 1, slots).scatter(-1, chosen, selected)
    return Routing(gates, chosen, torch.full((layers, 1, slots), 1 / slots), selected)


def twin(model: nn.Module) -> nn.Module:
    """Another tree of modules over the same parameters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
