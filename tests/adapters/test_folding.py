"""Ranks folded into a temporary weight for one call: the same result, and only where it is allowed and pays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from morsr.adapters import AdaptedLayer, InjectionReport, MoRConfig, inject

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (40, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (5, 9, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 12, 12)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (4, 17, 17)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 12, 12)),
    "mirrored border": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 12, 12)),
}


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def adapted(layer: nn.Module, **settings: object) -> tuple[Wrapped, InjectionReport]:
    torch.manual_seed(0)
    model = Wrapped(layer).eval()
    config = {
        "num_ranks": 6,
        "num_shared": 2,
        "top_k": 3,
        "num_zero": 1,
        "targets": ("layer",),
        "scale": 0.7,
        **settings,
    }
    report = inject(model, MoRConfig(**config), condition_dim=3)  # type: ignore[arg-type]
    with torch.no_grad():
        model.layer.sets["generator"].up.normal_()  # type: ignore[union-attr,index]
    report.context.eval()
    return model, report


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the batches that were folded."""
    seen: list[int] = []
    original = AdaptedLayer._folded

    def spy(self: AdaptedLayer, inputs: Tensor, *rest: object) -> Tensor:
        seen.append(len(inputs))
        return original(self, inputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AdaptedLayer, "_folded", spy)
    return seen


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_folding_gives_what_gathering_gives(name: str, folded: list[int]) -> None:
    build, shape = LAYERS[name]
    model, report = adapted(build())
    inputs = torch.randn(1, *shape)
    report.context.condition = torch.randn(1, 3) * 3
    ours = model(inputs)
    assert folded == [1]
    report.context.compute = "gathered"
    torch.testing.assert_close(ours, model(inputs), atol=2e-6, rtol=1e-5)
    report.context.compute = "masked"
    torch.testing.assert_close(ours, model(inputs), atol=2e-6, rtol=1e-5)
    assert folded == [1], "only auto may fold"


@torch.no_grad()
def test_a_plain_lora_and_one_routing_for_a_batch_are_folded_once(folded: list[int]) -> None:
    model, report = adapted(nn.Linear(6, 8), num_shared=6, top_k=0, num_zero=0)
    inputs = torch.randn(2, 40, 6)
    ours = model(inputs)
    report.context.compute = "gathered"
    torch.testing.assert_close(ours, model(inputs), atol=2e-6, rtol=1e-5)
    model, report = adapted(nn.Linear(6, 8))
    report.context.condition = torch.randn(1, 3)
    model(inputs)
    assert folded == [2, 2]


def test_what_may_not_be_folded_is_gathered(folded: list[int]) -> None:
    model, report = adapted(nn.Linear(6, 8))
    inputs = torch.randn(1, 40, 6)
    report.context.condition = torch.randn(1, 3)
    model(inputs)  # a gradient may be wanted
    with torch.no_grad():
        model(inputs[:, :1])  # one token: the weight is larger than what it is multiplied with
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs)
        calls: list[int] = []
        handle = model.layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        model(inputs)
        assert calls == [1]
        handle.remove()
        assert folded == []
        model(inputs)
    assert folded == [1]
    half, report = adapted(nn.Linear(6, 8).bfloat16())
    report.context.condition = torch.randn(1, 3)
    with torch.no_grad():
        half(inputs.bfloat16())
    assert folded == [1]


@torch.no_grad()
def test_the_weight_stays_as_it_was() -> None:
    model, report = adapted(nn.Conv2d(4, 6, 3, padding=1))
    before = model.layer.weight.clone()
    report.context.condition = torch.randn(1, 3)
    model(torch.randn(1, 4, 12, 12))
    torch.testing.assert_close(model.layer.weight, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("num_ranks", "images", "masks"),
    [(8, 2, True), (8, 1, False), (9, 2, False)],
    ids=["half of the ranks", "one image", "fewer than half"],
)
def test_a_batch_of_routings_that_take_half_of_the_ranks_is_masked(num_ranks: int, images: int, masks: bool) -> None:
    model, report = adapted(nn.Conv2d(4, 6, 3, padding=1), num_ranks=num_ranks, num_shared=2, top_k=2, num_zero=1)
    context, ranks = report.context, model.layer.sets["generator"]  # type: ignore[union-attr,index]
    inputs = torch.randn(images, 4, 5, 5)
    scores = torch.randn(images, 3) * 3
    context.condition = scores
    assert (context._layer_gates()[0].ranks is None) == masks
    found = {}
    for mode in ("auto", "gathered"):
        context.compute, context.condition = mode, scores
        model.zero_grad()
        output = model(inputs)
        output.square().sum().backward()
        found[mode] = (output, ranks.down.grad.clone(), ranks.up.grad.clone())
    for ours, theirs in zip(found["auto"], found["gathered"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
