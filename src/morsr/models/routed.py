"""How large the update of the routed ranks is beside that of the shared ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from morsr.adapters import InjectionReport
from morsr.functional.routing import Routing, rank_gates


@torch.no_grad()
def routed_update(adapters: InjectionReport, routing: Routing) -> Tensor:
    """Frobenius norm of the routed ranks' weight update over that of the shared ranks, per layer and image.

    Args:
        adapters: a routed set.
        routing: of B images.

    Returns:
        (L, B); NaN where the shared ranks' update is zero.
    """
    config = adapters.config
    gates = rank_gates(routing, config.num_experts, config.num_shared, config.expert_rank)
    gates[..., : config.num_shared] = 0
    sizes = []
    for gates_BR, layer in zip(gates, adapters.layers, strict=True):
        ranks = layer.sets[adapters.name]
        down, up = ranks.lora_A.flatten(1).float(), ranks.lora_B.float()
        products = (down @ down.T) * (up.T @ up)  # of every two ranks' updates
        routed = torch.einsum("br,rs,bs->b", gates_BR, products, gates_BR)
        shared = products[: config.num_shared, : config.num_shared].sum()
        sizes.append((routed.clamp_min(0) / shared).sqrt() if shared > 0 else torch.full_like(routed, torch.nan))
    return torch.stack(sizes)
