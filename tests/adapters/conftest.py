"""A small network with the kinds of layers that adapters meet, and helpers that fill and route adapter sets."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import InjectionReport, MoRConfig, inject
from morsr.adapters.inject import layers_of_set

SCORES = 3


class Toy(nn.Module):
    """Linear and Conv2d layers of several geometries: strided, dilated, 1×1, "same" padding, with and without bias."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.downsample = nn.Conv2d(width, width, 3, stride=2)
        self.dilated = nn.Conv2d(width, width, 3, padding=2, dilation=2, bias=False)
        self.shortcut = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(2, width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.pooled = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Conv2d(width, 3, (3, 1), padding="same"))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        hidden = self.downsample(F.pad(hidden, (0, 1, 0, 1)))
        hidden = self.norm(self.shortcut(F.silu(self.dilated(hidden))))
        tokens = self.to_q(hidden.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(hidden)
        scale = self.pooled(tokens.mean((2, 3)))[..., None, None]
        return self.head(hidden + tokens * scale.sigmoid())


def bare() -> Toy:
    """The seeded network in evaluation mode, before it is adapted."""
    torch.manual_seed(0)
    return Toy().eval()


TARGETS = ("conv_in", "downsample", "dilated", "shortcut", "to_q", "pooled", r"head\.0")

_KINDS: dict[str, dict[str, Any]] = {
    "mor": {"num_shared": 2, "top_k": 4, "num_zero": 2},
    "mor_v1": {"num_shared": 2, "top_k": 4, "num_zero": 0, "balance": "plain"},
    "lora_moe": {"num_shared": 4, "top_k": 2, "expert_rank": 2, "num_zero": 1, "balance": "plain"},
}


def small(kind: str = "mor", **settings: Any) -> MoRConfig:
    """Settings of a kind at toy size: 12 ranks, 2 shared, 4 of 10 + 2 slots."""
    values = {"num_ranks": 12, "targets": TARGETS, **settings}
    return MoRConfig.lora(**values) if kind == "lora" else MoRConfig.from_dict({**_KINDS[kind], **values})


def fill(model: nn.Module, name: str = "generator", std: float = 0.3) -> None:
    """Give a set's lora_B random values, so that it changes the output."""
    for _, _, ranks in layers_of_set(model, name):
        nn.init.normal_(ranks.lora_B, std=std)


def make(config: MoRConfig | None = None, *, filled: bool = True, **settings: Any) -> tuple[Toy, InjectionReport]:
    """A seeded toy network in evaluation mode with one adapter set, whose images differ in their choices."""
    model = bare()
    config = config or small(**settings)
    report = inject(model, config, condition_dim=SCORES if config.is_routed else 0)
    if filled:
        fill(model)
    if config.is_routed:
        nn.init.normal_(report.router.weight, std=1.0)
    return model, report


def apply(report: InjectionReport, scores: Tensor) -> None:
    """Route scores where the set routes."""
    if report.is_routed:
        report.route(scores)


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def scores():
    return torch.rand(3, SCORES, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def toy():
    """This module: Toy, bare, small, make, fill, apply."""
    import sys

    return sys.modules[__name__]
