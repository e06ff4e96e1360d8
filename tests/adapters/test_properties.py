"""One table of settings, run through every property that holds for all of them."""

import copy

import pytest
import torch
from torch import nn

from morsr.adapters import active_adapters, adapter_parameters, inject, load_adapters, merged, save_adapters
from morsr.adapters.inject import layers_of_set, plain_state_dict

SETTINGS = {
    "mor": ("mor", {}),
    "softmax gates, scale": ("mor", {"gate": "softmax", "scale": 2.0}),
    "gates of release 0.1": ("mor", {"gate": "renormalize"}),
    "zero slots among the ranks' in release 0.1": ("mor", {"zero_slots": "among", "num_zero": 3, "expert_rank": 1}),
    "nothing shared, one slot": ("mor", {"num_shared": 0, "top_k": 1, "num_zero": 1}),
    "all slots": ("mor", {"top_k": 12}),
    "gaussian": ("mor", {"init": "gaussian"}),
    "saved module": ("mor", {"modules_to_save": ("norm",)}),
    "mor_v1": ("mor_v1", {}),
    "lora_moe": ("lora_moe", {}),
    "lora": ("lora", {"scale": 0.2}),
}


@pytest.fixture(params=SETTINGS)
def config(request, toy):
    kind, changes = SETTINGS[request.param]
    return toy.small(kind, **changes)


def test_fresh_set_leaves_the_output_bit_identical(config, toy, images, scores):
    model, report = toy.make(config, filled=False)
    toy.apply(report, scores)
    adapted = model(images)
    with active_adapters(model, None):
        assert torch.equal(adapted, model(images))
    torch.testing.assert_close(adapted, toy.bare()(images))


@torch.no_grad()
def test_an_adapted_layer_is_the_sum_over_its_ranks(config, toy, scores):
    """The definition: W x + scale · Σ_r g_r B_r (A_r x), rank by rank, in float64."""
    model, report = toy.make(config)
    toy.apply(report, scores)
    for name, layer, ranks in layers_of_set(model, "generator"):
        base = copy.deepcopy(layer.base_layer).double()
        x = torch.randn(3, base.weight.shape[1], *([8, 8] if base.weight.ndim == 4 else [])).double()
        expected = base(x)
        for rank in range(config.num_ranks):
            one = copy.deepcopy(base)
            one.bias = None
            one.weight.data = torch.einsum("o,i...->oi...", ranks.lora_B[:, rank], ranks.lora_A[rank]).double()
            factor = torch.ones(3)
            if rank >= config.num_shared:
                expert = (rank - config.num_shared) // config.expert_rank
                factor = report.routing.gates[ranks.index, :, expert]
            expected += config.scale * factor.double().view(3, *[1] * (x.ndim - 1)) * one(x)
        torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_merged_equals_masked_and_restores_every_bit(config, toy, images, scores):
    model, report = toy.make(config)
    before = copy.deepcopy(plain_state_dict(model))
    for image in range(len(images)):
        toy.apply(report, scores[image : image + 1])
        masked = model(images[image : image + 1])
        with merged(model):
            torch.testing.assert_close(model(images[image : image + 1]), masked, rtol=1e-4, atol=1e-5)
    after = plain_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_images_do_not_depend_on_their_batch(config, toy, images, scores):
    model, report = toy.make(config)
    toy.apply(report, scores)
    together = model(images)
    order = torch.tensor([2, 0, 1])
    toy.apply(report, scores[order])
    torch.testing.assert_close(model(images[order]), together[order], rtol=1e-4, atol=1e-5)
    toy.apply(report, scores[1:2])
    torch.testing.assert_close(model(images[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


def test_only_the_set_is_trained_and_the_base_stays_bit_equal(config, toy, images, scores):
    model, report = toy.make(config)
    before = copy.deepcopy(plain_state_dict(model))
    parameters = adapter_parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        toy.apply(report, scores)
        model(images).square().mean().backward()
        optimizer.step()
    after = plain_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    moved = [p for p in parameters if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) >= len(parameters) - 2  # a bias may be free of any effect


def test_checkpointing_gives_the_same_gradients_whatever_runs_in_between(config, toy, images, scores):
    """Recomputation takes the set and the gates of its own forward pass, with two sets on one base."""

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model, report = toy.make(config)
        inject(model, toy.small("lora", num_ranks=2), name="score")
        toy.fill(model, "score")
        toy.apply(report, scores)
        output = report.switch.checkpoint(model, images) if recompute else model(images)
        with active_adapters(model, "score"):
            second = report.switch.checkpoint(model, images) if recompute else model(images)
        toy.apply(report, scores.flip(0))  # the backward pass finds another routing and another active set
        with active_adapters(model, None):
            (output.square().mean() + second.square().mean()).backward()
        return [torch.zeros(1) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_saving_and_loading_gives_the_same_output(config, toy, images, scores, tmp_path):
    model, report = toy.make(config)
    if report.copies:
        nn.init.normal_(report.layers[0].sets["generator"].lora_A)
        nn.init.normal_(model.norm.copies["generator"].weight)
    if report.is_routed:
        report.router.standardize(torch.full((toy.SCORES,), 0.4), torch.full((toy.SCORES,), 0.2))
    toy.apply(report, scores)
    expected = model(images)
    save_adapters(tmp_path / "set.safetensors", model)
    for twin in (toy.bare(), toy.make(config, filled=False)[0]):  # a bare model, and one that has the set
        loaded = load_adapters(tmp_path / "set.safetensors", twin)
        toy.apply(loaded, scores)
        assert torch.equal(twin(images), expected)
    assert loaded.config == config


@torch.no_grad()
def test_a_deep_copy_is_independent(config, toy, images, scores):
    model, report = toy.make(config)
    toy.apply(report, scores)
    expected = model(images)
    twin = copy.deepcopy(model)
    for _, _, ranks in layers_of_set(twin, "generator"):
        ranks.lora_B.zero_()
    assert torch.equal(model(images), expected)
    assert not torch.equal(twin(images), expected)


@torch.no_grad()
def test_half_precision_of_the_model_leaves_the_router_in_float32(config, toy, images, scores):
    model, report = toy.make(config)
    model.to(torch.bfloat16)
    toy.apply(report, scores)
    assert model(images.bfloat16()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in report.router.parameters())
