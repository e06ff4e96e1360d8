"""Routing of images to rank experts: the choice of slots, their gates, and how much of an image they carry.

Dimensions: L layers, B images, N slots (the gate's outputs: E real experts, then zero experts), K slots chosen,
e ranks per expert, S shared ranks, R = S + E·e ranks in all. Everything here is float32 or wider.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gate = Literal["renormalize_real", "softmax", "renormalize"]


class Routing(NamedTuple):
    """Everything the router decided for a batch of images.

    Attributes:
        gates: (L, B, N) factor of each slot, 0 where it was not chosen; real experts first, then zero experts.
        chosen: (L, B, K) int64 slots, the highest logit first, ties in favour of the lowest slot.
        probabilities: (L, B, N) softmax over all slots, without noise and before any choice; the balance loss reads it.
    """

    gates: Tensor
    chosen: Tensor
    probabilities: Tensor

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.gates.shape[1]

    @property
    def selected(self) -> Tensor:
        """(L, B, K) gates of the chosen slots, in the order of ``chosen``."""
        return self.gates.gather(-1, self.chosen)

    def image(self, index: int) -> Routing:
        """Routing of one image, as a batch of one."""
        index = range(self.batch)[index]
        return Routing(*(field[:, index : index + 1] for field in self))

    def detach(self) -> Routing:
        """The same numbers without their gradient."""
        return Routing(*(field.detach() for field in self))

    def to(self, device: torch.device | str | int) -> Routing:
        """Move to a device."""
        return Routing(*(field.to(device) for field in self))


def route(
    logits: Tensor, top_k: int, num_real: int, *, noise: Tensor | None = None, gate: Gate = "renormalize_real"
) -> Routing:
    """Choose top_k slots per layer and image and compute their gates.

    Args:
        logits: (L, B, N).
        top_k: number of slots K, 1 ≤ K ≤ N.
        num_real: number of real experts E; slots from E on are zero experts.
        noise: (L, B, N) added to the logits for the choice and its gates, not for ``probabilities``; None for none.
        gate: "renormalize_real": a softmax over the chosen real slots, times their number: an even gate is 1, and a
            zero expert takes a place but no mass; "softmax": the probabilities over all slots; "renormalize": the
            chosen probabilities divided by their sum, times K, in which zero experts take mass too (release 0.1).

    Source: MoR-DASR (arXiv 2511.16024), section on the mixture of ranks; the form of the gate is left open there.
    """
    noisy = logits if noise is None else logits + noise
    if torch.compiler.is_exporting():
        chosen = noisy.detach().topk(top_k).indices  # ONNX has no stable sort; its TopK gives ties to the lowest slot
    else:
        # torch.topk leaves the order of ties open; a stable sort settles them the same way on every device.
        chosen = torch.sort(noisy.detach(), dim=-1, descending=True, stable=True).indices[..., :top_k]
    if gate == "renormalize_real":
        real = chosen < num_real
        # The lowest finite number, not -inf: a layer whose places are all zero experts must not give NaN.
        masked = noisy.gather(-1, chosen).masked_fill(~real, torch.finfo(noisy.dtype).min)
        selected = masked.softmax(-1) * real * real.sum(-1, keepdim=True)
    else:
        selected = noisy.softmax(-1).gather(-1, chosen)
        if gate == "renormalize":
            selected = selected * (top_k / selected.sum(-1, keepdim=True))
    return Routing(torch.zeros_like(logits).scatter(-1, chosen, selected), chosen, logits.softmax(-1))


def rank_gates(routing: Routing, num_real: int, num_shared: int, expert_rank: int, *, strength: float = 1.0) -> Tensor:
    """Factor of every rank: (L, B, R), shared ranks first with factor 1, routed ones times ``strength``."""
    routed = routing.gates[..., :num_real].repeat_interleave(expert_rank, dim=-1) * strength
    return torch.cat([routed.new_ones(*routed.shape[:2], num_shared), routed], dim=-1)


def slot_load(chosen: Tensor, num_slots: int) -> Tensor:
    """How often each slot was chosen: (L, N) counts in float32 that sum to B·K per layer, from chosen (L, B, K)."""
    counts = torch.zeros(chosen.shape[0], num_slots, device=chosen.device)
    flat = chosen.flatten(1)
    return counts.scatter_add(1, flat, torch.ones_like(flat, dtype=counts.dtype))


def gate_mass(gates: Tensor, num_real: int) -> Tensor:
    """Sum of the routed gates of real experts, (...,) from gates (..., N): how much of the update they carry."""
    return gates[..., :num_real].sum(-1)


def effective_ranks(gates: Tensor, num_real: int) -> Tensor:
    """Number of real experts that share the gate mass: exp of its entropy, (...,) from gates (..., N); 0 without mass.

    >>> effective_ranks(torch.tensor([1.0, 1.0, 0.0, 9.0]), 3).item()
    2.0
    """
    real = gates[..., :num_real]
    mass = real.sum(-1, keepdim=True)
    entropy = torch.special.entr(real / mass.clamp_min(1e-12)).sum(-1)
    return torch.where(mass[..., 0] > 0, entropy.exp(), 0.0)
