"""Routing of images to rank experts: logits, the choice of slots, their gates, and what each rank is multiplied by.

Dimensions: L layers, B images, D degradation scores, N slots (the gate's outputs: E real experts, then zero experts),
K slots chosen, e ranks per expert, S shared ranks, R = S + E·e ranks in all. Everything here is float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morsr.errors import InputError


class Routing(NamedTuple):
    """Everything the router decided for a batch of images.

    Attributes:
        gates: (L, B, N) factor of each slot, 0 where it was not chosen; real experts first, then zero experts.
        chosen: (L, B, K) int64 slots, the highest logit first, ties in favour of the lowest slot.
        probabilities: (L, B, N) softmax over all slots, without noise and before any choice; the balance loss reads it.
        selected: (L, B, K) gates of the chosen slots, in the order of ``chosen``.
    """

    gates: Tensor
    chosen: Tensor
    probabilities: Tensor
    selected: Tensor

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.gates.shape[1]

    def image(self, index: int) -> Routing:
        """Routing of one image, as a batch of one."""
        if not -self.batch <= index < self.batch:
            raise IndexError(f"routing holds {self.batch} images, asked for {index}")
        index %= self.batch
        return Routing(*(field[:, index : index + 1] for field in self))

    def detach(self) -> Routing:
        """The same numbers without their gradient."""
        return Routing(*(field.detach() for field in self))

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Routing:
        """Move to a device; a dtype is not taken, for gates stay in float32.

        Raises:
            InputError: something else than a device.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise InputError(f"routing: expected a device to move to, got {device!r}; its numbers keep their dtype")
        return Routing(*(field.to(device, non_blocking=non_blocking) for field in self))


def router_logits(scores: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear router of all layers at once.

    Args:
        scores: (B, D) or, behind a hidden layer, (L, B, D).
        weight: (L, N, D).
        bias: (L, N).

    Returns:
        (L, B, N) logits.
    """
    if scores.ndim == 2:
        scores = scores.expand(weight.shape[0], *scores.shape)
    return torch.baddbmm(bias[:, None], scores, weight.transpose(1, 2))


def route(logits: Tensor, top_k: int, *, noise: Tensor | None = None, normalization: str = "renormalize") -> Routing:
    """Choose top_k slots per layer and image and compute their gates.

    Args:
        logits: (L, B, N).
        top_k: number of slots K, 1 ≤ K ≤ N.
        noise: (L, B, N) added to the logits for the choice and its gates, not for ``probabilities``; None for none.
        normalization: "renormalize": the chosen probabilities divided by their sum, times K, so that an even gate
            is 1 and the layer a plain LoRA of that rank; "softmax": the probabilities as they are.

    Source: MoR-DASR (arXiv 2511.16024), section on the mixture of ranks; the normalisation is left open there.
    """
    probabilities = logits.softmax(-1)
    noisy = probabilities if noise is None else (logits + noise).softmax(-1)
    # torch.topk leaves the order of ties open; a stable sort settles them the same way on every device. The choice is
    # made on the logits, since the softmax can round two of them to one value.
    ranking = logits if noise is None else logits + noise
    chosen = torch.sort(ranking.detach(), dim=-1, descending=True, stable=True).indices[..., :top_k]
    selected = noisy.gather(-1, chosen)
    if normalization == "renormalize":
        selected = selected * (top_k / selected.sum(-1, keepdim=True))
    gates = torch.zeros_like(probabilities).scatter(-1, chosen, selected)
    return Routing(gates, chosen, probabilities, selected)


def limit_experts(routing: Routing, num_real: int, *, budget: int | None = None, generative: float = 1.0) -> Routing:
    """Apply the two knobs of inference to a routing.

    Args:
        routing: what the router decided.
        num_real: number of real experts E; slots from E on are zero experts.
        budget: at most so many real experts per layer and image: those with the smallest gates are dropped, the others
            keep theirs; None for no limit.
        generative: factor on the gates of the routed experts; 0 leaves the shared ranks alone.
    """
    selected = routing.selected
    if budget is not None and budget < selected.shape[-1]:
        real = routing.chosen < num_real
        # Position among the real experts by falling gate; chosen is sorted already, so counting is enough.
        position = real.cumsum(-1) - 1
        selected = selected * (~real | (position < budget))
    if generative != 1.0:
        selected = selected * generative
    if selected is routing.selected:
        return routing
    gates = torch.zeros_like(routing.gates).scatter(-1, routing.chosen, selected)
    return routing._replace(gates=gates, selected=selected)


def rank_gates(routing: Routing, num_real: int, num_shared: int, expert_rank: int) -> Tensor:
    """Factor of every rank: (L, B, R), shared ranks first with factor 1."""
    routed = routing.gates[..., :num_real].repeat_interleave(expert_rank, dim=-1)
    return torch.cat([routed.new_ones(*routed.shape[:2], num_shared), routed], dim=-1)


def chosen_ranks(routing: Routing, num_real: int, num_shared: int, expert_rank: int) -> tuple[Tensor, Tensor]:
    """Indices and factors of the ranks that work: (L, B, S + K·e) each, of one size for every image.

    A chosen zero expert keeps its place with factor 0 (on the first expert's ranks): no shape depends on the data.
    """
    layers, batch, _ = routing.chosen.shape
    real = routing.chosen < num_real
    expert = torch.where(real, routing.chosen, 0)
    steps = torch.arange(expert_rank, device=expert.device)
    routed = (num_shared + expert[..., None] * expert_rank + steps).flatten(-2)
    factors = (routing.selected * real).repeat_interleave(expert_rank, dim=-1)
    shared = torch.arange(num_shared, device=expert.device).expand(layers, batch, num_shared)
    ones = factors.new_ones(layers, batch, num_shared)
    return torch.cat([shared, routed], dim=-1), torch.cat([ones, factors], dim=-1)


def slot_load(chosen: Tensor, num_slots: int) -> Tensor:
    """How often each slot was chosen: (L, N) counts in float32 that sum to B·K per layer, from chosen (L, B, K)."""
    counts = torch.zeros(chosen.shape[0], num_slots, device=chosen.device)
    flat = chosen.flatten(1)
    return counts.scatter_add(1, flat, torch.ones_like(flat, dtype=counts.dtype))
