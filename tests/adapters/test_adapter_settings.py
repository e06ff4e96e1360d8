"""One table of settings, run through every property that holds for all of them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from morsr.adapters import AdaptedLayer, active_adapters, adapter_parameter_groups, adapter_parameters, inject, merged
from morsr.functional.routing import Routing

SETTINGS = {
    "mor": ("mor", {}),
    "mor, mlp router": ("mor", {"router": "mlp", "router_hidden": 5}),
    "mor, softmax gates, scale": ("mor", {"gate": "softmax", "scale": 2.0}),
    "mor, zero slots among": ("mor", {"zero_slots": "among", "num_zero": 3}),
    "mor, nothing shared, one slot": ("mor", {"num_shared": 0, "top_k": 1, "num_zero": 1}),
    "mor, all slots": ("mor", {"top_k": 12}),
    "mor, gaussian, base dtype": ("mor", {"init": "gaussian", "dtype": "base"}),
    "mor_v2": ("mor_v2", {}),
    "mor_v1": ("mor_v1", {}),
    "lora_moe": ("lora_moe", {"num_zero": 1}),
    "lora": ("lora", {"scale": 0.2}),
}


@pytest.fixture(params=SETTINGS)
def config(request, small_config):
    kind, changes = SETTINGS[request.param]
    return small_config(kind, **changes)


def set_condition(report, scores):
    if report.context.config.is_routed:
        report.context.condition = scores


def test_fresh_set_changes_no_bit(config, make_toy, images, scores):
    model, report = make_toy(config, filled=False)
    set_condition(report, scores)
    with torch.no_grad():
        adapted = model(images)
        with active_adapters(model, None):
            bare = model(images)
    assert torch.equal(adapted, bare)


@torch.no_grad()
def test_gathered_masked_and_merged_agree(config, make_toy, images, scores):
    model, report = make_toy(config)
    context = report.context
    set_condition(report, scores)
    gathered = model(images)
    with active_adapters(model, None):
        assert (model(images) - gathered).abs().max() > 1e-2
    context.compute = "masked"
    torch.testing.assert_close(model(images), gathered, rtol=1e-4, atol=1e-5)
    context.compute = "auto"
    for image in range(len(images)):
        set_condition(report, scores[image : image + 1])
        with merged(model):
            torch.testing.assert_close(
                model(images[image : image + 1]), gathered[image : image + 1], rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
def test_images_do_not_depend_on_their_batch(config, make_toy, images, scores):
    model, report = make_toy(config)
    set_condition(report, scores)
    together = model(images)
    order = torch.tensor([2, 0, 1])
    set_condition(report, scores[order])
    torch.testing.assert_close(model(images[order]), together[order], rtol=1e-4, atol=1e-5)
    set_condition(report, scores[1:2])
    torch.testing.assert_close(model(images[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tiles_share_one_routing(config, make_toy, images, scores):
    model, report = make_toy(config)
    set_condition(report, scores[:1])
    tiles = model(images)
    for tile in range(len(images)):
        torch.testing.assert_close(model(images[tile : tile + 1]), tiles[tile : tile + 1], rtol=1e-4, atol=1e-5)


def test_gates_of_one_equal_a_plain_lora(config, make_toy, small_config, images):
    config = dataclasses.replace(config, top_k=config.num_slots)
    model, report = make_toy(config)
    if config.is_routed:
        shape, slots = (len(report.context.layer_names), 1), config.num_slots
        even, chosen = torch.full((*shape, slots), 1 / slots), torch.arange(slots).expand(*shape, slots)
        report.context.routing = Routing(torch.ones(*shape, slots), chosen, even, torch.ones(*shape, slots))
    plain, _ = make_toy(small_config("lora", num_ranks=config.stored_ranks, scale=config.scale), filled=False)
    ranks = [module.sets["generator"] for module in model.modules() if isinstance(module, AdaptedLayer)]
    twins = [module.sets["generator"] for module in plain.modules() if isinstance(module, AdaptedLayer)]
    for theirs, mine in zip(twins, ranks, strict=True):
        theirs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)


def test_training_moves_the_set_and_no_base_bit(config, make_toy, images, scores):
    model, report = make_toy(config)
    context = report.context
    before = copy.deepcopy(model.state_dict())
    model.train()
    context.noise_sigma = 1.0
    own = adapter_parameters(model)
    optimizer = torch.optim.AdamW(adapter_parameter_groups(model, "generator", 1e-2), weight_decay=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(own)
    for _ in range(3):
        set_condition(report, scores)
        loss = model(images).square().mean()
        if context.config.is_routed:
            loss = loss + context.balance_loss(torch.tensor([0.1, 0.5, 0.9]))
        optimizer.zero_grad()
        loss.backward()
        # Every parameter gets a gradient in every step: DistributedDataParallel needs no flag for unused ones.
        assert all(parameter.grad is not None for parameter in own)
        optimizer.step()
    ids = {id(parameter) for parameter in own}
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == {key for key, parameter in model.named_parameters() if id(parameter) in ids}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in ids)


def test_bf16_autocast_keeps_gates_in_float32(config, make_toy, images, scores):
    model, report = make_toy(config)
    with torch.no_grad():
        set_condition(report, scores)
        exact, gates = model(images), report.context.routing
        with torch.autocast("cpu", dtype=torch.bfloat16):
            set_condition(report, scores)
            low = model(images)
    if gates is not None:
        assert report.context.routing.gates.dtype == torch.float32
        assert torch.equal(report.context.routing.gates, gates.gates)
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)


def test_gradients_in_float64(config, scores):
    net = nn.Sequential(nn.Linear(4, 4))
    report = inject(net, dataclasses.replace(config, targets=["0"]), condition_dim=3)
    net.double()
    nn.init.normal_(net[0].sets["generator"].up)
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ranks = net[0].sets["generator"]

    def run(inputs, down, up, scores):
        if config.is_routed:
            report.context.condition = scores
        return net(inputs)

    scores = scores.double().requires_grad_(config.is_routed)
    assert torch.autograd.gradcheck(run, (inputs, ranks.down, ranks.up, scores), fast_mode=True)
