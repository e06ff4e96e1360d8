"""A small network with every kind of layer that adapters meet, and helpers that fill and compare adapter sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import AdaptedLayer, InjectionReport, MoRConfig, inject

SCORES = 3


class Toy(nn.Module):
    """Linear and Conv2d layers of all geometries: strided, asymmetrically padded, grouped, dilated, reflected."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.downsample = nn.Conv2d(width, width, 3, stride=2)
        self.grouped = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=4)
        self.reflected = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False)
        self.shortcut = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(2, width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.pooled = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Conv2d(width, 3, 3, padding="same"))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        hidden = self.downsample(F.pad(hidden, (0, 1, 0, 1)))
        hidden = self.shortcut(F.silu(self.grouped(hidden))) + self.reflected(hidden)
        hidden = self.norm(hidden)
        tokens = self.to_q(hidden.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(hidden)
        scale = self.pooled(tokens.mean((2, 3)))[..., None, None]
        return self.head(hidden + tokens * scale.sigmoid())


TOY_TARGETS = ("conv_in", "downsample", "grouped", "reflected", "shortcut", "to_q", "pooled", r"head\.0")


def fill(model: nn.Module, name: str = "generator", std: float = 0.3) -> None:
    """Give a set's up projections random values, so that it changes the output."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and name in module.sets:
            nn.init.normal_(module.sets[name].up, std=std)


def make(config: MoRConfig | None = None, *, filled: bool = True, **settings: Any) -> tuple[Toy, InjectionReport]:
    """A seeded toy network in evaluation mode with one adapter set."""
    torch.manual_seed(0)
    model = Toy().eval()
    config = config or small(**settings)
    report = inject(model, config, condition_dim=SCORES if config.is_routed else None)
    if filled:
        fill(model)
    if config.is_routed:
        # Wide enough that images differ in their choices.
        nn.init.normal_(report.context.weight, std=1.0)
    return model, report


def small(kind: str = "mor", **settings: Any) -> MoRConfig:
    """Settings of a kind at toy size: 12 ranks, 2 shared, 4 of 10 + 2 slots."""
    sizes: dict[str, dict[str, Any]] = {
        "mor": {"num_shared": 2, "top_k": 4, "num_zero": 2},
        "mor_v2": {"num_shared": 2, "top_k": 4, "num_zero": 2},
        "mor_v1": {"num_shared": 2, "top_k": 4},
        "lora_moe": {"num_shared": 4, "top_k": 2, "expert_rank": 2},
        "lora": {},
    }
    return MoRConfig.of_kind(kind, **{"num_ranks": 12, "targets": TOY_TARGETS, **sizes[kind], **settings})


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def scores() -> Tensor:
    return torch.rand(3, SCORES, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def make_toy() -> Callable[..., tuple[Toy, InjectionReport]]:
    return make


@pytest.fixture
def fill_set() -> Callable[..., None]:
    return fill


@pytest.fixture
def small_config() -> Callable[..., MoRConfig]:
    return small
