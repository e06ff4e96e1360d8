from __future__ import annotations

import pytest
import torch

from morsr.adapters import active_adapters
from morsr.errors import ConfigError


@torch.no_grad()
def test_generative_zero_leaves_the_shared_ranks(make_toy, images, scores):
    model, report = make_toy()
    context = report.context
    context.condition = scores
    full = model(images)
    context.generative = 0.0
    shared = model(images)
    for module in model.modules():
        if hasattr(module, "sets") and "generator" in module.sets:
            module.sets["generator"].up[context.config.num_shared :] = 0
    context.generative = 1.0
    torch.testing.assert_close(model(images), shared, rtol=1e-4, atol=1e-5)
    assert (full - shared).abs().max() > 1e-2
    with active_adapters(model, None):
        assert (model(images) - shared).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("mode", ["gathered", "masked"])
def test_budget_keeps_the_largest_gates_as_they_are(mode, make_toy, images, scores):
    model, report = make_toy()
    context = report.context
    context.compute = mode
    context.condition = scores
    full, decided = model(images), context.routing
    context.budget = 99
    assert torch.equal(model(images), full)
    context.budget = 0
    none = model(images)
    context.generative = 0.0
    torch.testing.assert_close(model(images), none, rtol=1e-4, atol=1e-5)
    context.generative = 1.0
    context.budget = 1
    real = context.effective_routing.gates[..., : context.config.num_experts]
    assert ((real > 0).sum(-1) <= 1).all()
    torch.testing.assert_close(real.amax(-1), decided.gates[..., : context.config.num_experts].amax(-1))
    # What the router decided stays on record; the knobs are not part of it.
    assert context.routing is decided
    context.budget = None
    assert torch.equal(model(images), full)


def test_budget_counts_ranks_where_experts_are_whole_loras(make_toy, small_config, scores):
    _, report = make_toy(small_config("lora_moe"))
    context = report.context
    context.condition = scores
    context.budget = 3
    assert ((context.effective_routing.gates > 0).sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("knob", "value"),
    [("budget", -1), ("budget", 2.0), ("generative", -0.5), ("generative", float("nan")), ("compute", "x")],
)
def test_bad_knobs(knob, value, make_toy, scores):
    _, report = make_toy()
    report.context.condition = scores
    before = getattr(report.context, knob)
    with pytest.raises(ConfigError, match=knob):
        setattr(report.context, knob, value)
    assert getattr(report.context, knob) == before
