"""One image in depth: its scores, the ranks that run for it, the work they cost, and what changes without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from morsr.adapters import Routing, active_adapters
from morsr.errors import ConfigError, InputError, check_images
from morsr.evaluation.specialisation import Specialisation
from morsr.models.generator import OneStepGenerator, enlarge, pad_to_multiple


@dataclass(frozen=True)
class WithoutRanks:
    """The image restored with some ranks switched off.

    Attributes:
        name: which ranks.
        count: how many of the ranks that ran for this image were switched off, over all layers.
        image: (3, H, W) in [0, 1].
        difference: root mean square change against the full result, in steps of 8-bit values.
    """

    name: str
    count: int
    image: Tensor
    difference: float


@dataclass(frozen=True)
class Example:
    """One image and what its ranks do.

    Attributes:
        name: of the image.
        scores: degradation scores by name.
        severity: in [0, 1].
        enlarged, restored: (3, H, W) in [0, 1]: bicubic, and with all its ranks.
        without: the image with groups of ranks switched off.
        ranks: (L,) ranks that ran, shared ones included.
        network_flops: work of the base networks for this image, in floating-point operations.
        adapter_flops: work of the ranks that ran.
        saved_flops: work of the ranks that zero slots spared.
    """

    name: str
    scores: dict[str, float]
    severity: float
    enlarged: Tensor
    restored: Tensor
    without: tuple[WithoutRanks, ...]
    ranks: Tensor
    network_flops: float
    adapter_flops: float
    saved_flops: float


def switch_off(routing: Routing, off_LN: Tensor) -> Routing:
    """The same routing with some slots' gates at zero; the other gates keep their values.

    Args:
        off_LN: boolean (L, N), True for the slots to switch off.
    """
    off = off_LN[:, None].expand(-1, routing.batch, -1)
    return routing._replace(gates=routing.gates.masked_fill(off, 0))


@torch.no_grad()
def examine(
    generator: OneStepGenerator,
    lr: Tensor,
    *,
    name: str = "image",
    scale: float = 4.0,
    specialisation: Specialisation | None = None,
    max_side: int = 128,
) -> Example:
    """Restore one image with and without groups of its ranks.

    Args:
        generator: with routed adapters, in evaluation mode.
        lr: (1, 3, h, w) in [0, 1]; larger images are centre-cropped to max_side for the restored pictures, while scores
            and routing come from the whole.
        name: of the image.
        scale: enlargement.
        specialisation: of many images; with it the slots of each kind of degradation are switched off as a group.
        max_side: longest side of the crop, in LR pixels.

    Raises:
        ConfigError: a generator without routing.
        InputError: not one image.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.config.is_routed:
        raise ConfigError("this model has no routing: there are no ranks to switch off")
    check_images(lr, name="lr")
    if len(lr) != 1:
        raise InputError(f"lr: expected one image, got {len(lr)}")
    before = adapters.routing
    try:
        scores = generator.route(lr)
        routing = adapters.routing
        assert scores is not None
        assert routing is not None
        crop = _centre(lr, max_side)
        size = (round(crop.shape[-2] * scale), round(crop.shape[-1] * scale))
        enlarged = enlarge(crop, size)

        def restore(chosen: Routing) -> Tensor:
            adapters.route(chosen)
            padded = pad_to_multiple(enlarged, generator.multiple)
            return generator.decode(generator.denoise(generator.encode(padded)))[0, :, : size[0], : size[1]].clamp(0, 1)

        positions = _count_positions(generator, lambda: restore(routing))
        restored = restore(routing)
        without = [
            _without(label, off, routing, adapters.config.num_experts, restore, restored)
            for label, off in _groups(generator, routing, specialisation)
        ]
        with active_adapters(generator.backbone, None), FlopCounterMode(display=False) as counter:
            restore(routing)
    finally:
        adapters.route(before)
    config = adapters.config
    zero = (routing.chosen[:, 0] >= config.num_experts).sum(-1).double().cpu()
    per_rank = torch.tensor([positions[layer] for layer in adapters.layer_names], dtype=torch.float64)
    ranks = config.num_shared + (config.top_k - zero) * config.expert_rank
    return Example(
        name=name,
        scores=dict(zip(scores.names, scores.scores[0].tolist(), strict=True)),
        severity=scores.severity[0].item(),
        enlarged=enlarged[0].cpu(),
        restored=restored.cpu(),
        without=tuple(without),
        ranks=ranks,
        network_flops=float(counter.get_total_flops()),
        adapter_flops=(per_rank * ranks).sum().item(),
        saved_flops=(per_rank * zero * config.expert_rank).sum().item(),
    )


def _groups(
    generator: OneStepGenerator, routing: Routing, specialisation: Specialisation | None
) -> list[tuple[str, Tensor]]:
    """Named masks (L, N) of slots to switch off; kinds that no chosen slot stands for are left out."""
    chosen = routing.gates[:, 0] > 0
    groups = [("all routed ranks", torch.ones_like(chosen))]
    if specialisation is not None:
        for index, kind in enumerate(specialisation.kinds):
            mask = (specialisation.kind == index) & (specialisation.p_value < 0.01)
            groups.append((f"ranks for {kind}", mask.to(chosen.device)))
    layer, slot = _strongest(generator, routing)
    single = torch.zeros_like(chosen)
    single[layer, slot] = True
    assert generator.adapters is not None
    groups.append((f"one rank: {generator.adapters.layer_names[layer]}, expert {slot}", single))
    real = generator.adapters.config.num_experts
    return [(label, mask) for label, mask in groups if (mask & chosen)[:, :real].any()]


def _strongest(generator: OneStepGenerator, routing: Routing) -> tuple[int, int]:
    """Layer and expert whose update, gate times the norms of its two factors, is the largest."""
    adapters = generator.adapters
    assert adapters is not None
    config = adapters.config
    strength = []
    for row, name in enumerate(adapters.layer_names):
        ranks = _layer(generator, name).sets[adapters.name]  # type: ignore[index]
        norms = ranks.lora_A.flatten(1).norm(dim=1) * ranks.lora_B.norm(dim=0)
        experts = norms[config.num_shared :].float().view(config.num_experts, config.expert_rank).norm(dim=1)
        strength.append(routing.gates[row, 0, : config.num_experts] * experts)
    return divmod(int(torch.stack(strength).argmax()), config.num_experts)


def _without(
    label: str, off: Tensor, routing: Routing, num_real: int, restore: Callable[[Routing], Tensor], full: Tensor
) -> WithoutRanks:
    image = restore(switch_off(routing, off))
    count = int((off & (routing.gates[:, 0] > 0))[:, :num_real].sum())
    return WithoutRanks(label, count, image.cpu(), (image - full).square().mean().sqrt().item() * 255)


def _count_positions(generator: OneStepGenerator, run: Callable[[], object]) -> dict[str, float]:
    """Floating-point operations of one rank in each adapted layer: two per weight and position of the output."""
    adapters = generator.adapters
    assert adapters is not None
    work: dict[str, float] = dict.fromkeys(adapters.layer_names, 0.0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            ranks = layer.sets[adapters.name]
            positions = output.numel() / ranks.lora_B.shape[0]
            work[name] += 2 * positions * (ranks.lora_A[0].numel() + ranks.lora_B.shape[0])

        return hook

    handles = [_layer(generator, name).register_forward_hook(hook_of(name)) for name in adapters.layer_names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return work


def _layer(generator: OneStepGenerator, name: str) -> nn.Module:
    return generator.backbone.get_submodule(name)


def _centre(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return images[..., top : top + side, left : left + side]
