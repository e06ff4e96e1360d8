from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from morsr.adapters import MoRConfig, inject
from morsr.adapters.router import RoutingContext
from morsr.errors import InputError
from morsr.functional.balance import balance_loss, running_rate


def even(layers=1, images=2, slots=6):
    return torch.full((layers, images, slots), 1 / slots), torch.full((layers, slots), 1 / slots)


def test_even_router_gives_alpha_per_layer():
    probabilities, share = even(layers=3)
    for reduction, expected in (("sum", 3 * 0.5), ("mean", 0.5)):
        loss = balance_loss(probabilities, share, None, 4, alpha=0.5, reduction=reduction)
        assert loss.item() == pytest.approx(expected)
    # Severity enters relative to its mean, so it leaves the even router's loss alone.
    loss = balance_loss(probabilities, share, torch.tensor([0.4, 1.6]), 4, alpha=0.5)
    assert loss.item() == pytest.approx(3 * 0.5)


def test_collapsed_layers_are_seen_though_their_mean_is_even():
    eye = torch.eye(4)
    probabilities, share = eye[:, None].expand(4, 5, 4), eye
    assert torch.allclose(probabilities.mean(0), torch.tensor(0.25))
    assert balance_loss(probabilities, share, None, 4, alpha=1.0, reduction="mean").item() == pytest.approx(4.0)


def test_gradient_pushes_severe_images_off_zero_slots_and_leaves_real_slots_to_the_load():
    logits = torch.zeros(1, 2, 6, requires_grad=True)
    share = torch.full((1, 6), 1 / 6)
    balance_loss(logits.softmax(-1), share, torch.tensor([0.2, 1.8]), 4, alpha=1.0).backward()
    light, severe = logits.grad[0]
    assert (light[4:] < 0).all()
    assert (severe[4:] > 0).all()
    plain = torch.zeros(1, 2, 6, requires_grad=True)
    balance_loss(plain.softmax(-1), share, None, 4, alpha=1.0).backward()
    torch.testing.assert_close(plain.grad, torch.zeros_like(plain))


def test_running_rate_is_a_mean_and_then_forgets():
    seen, value = torch.tensor(0.0), torch.tensor(0.0)
    for batch in (1.0, 2.0, 6.0):
        value = value + running_rate(seen, torch.tensor(1.0), 100) * (batch - value)
        seen = seen + 1
    assert value.item() == pytest.approx(3.0)
    assert running_rate(torch.tensor(1e6), torch.tensor(4.0), 512).item() == pytest.approx(4 / 512)
    assert running_rate(torch.tensor(1e6), torch.tensor(4000.0), 512).item() == 1.0


def context_of(**settings):
    torch.manual_seed(0)
    config = MoRConfig(**{"num_ranks": 6, "num_shared": 2, "top_k": 2, "num_zero": 2, "balance_alpha": 1.0, **settings})
    context = RoutingContext(config, ["a", "b"], 1)
    nn.init.normal_(context.weight)
    return context.train()


def test_running_share_is_of_choices_and_is_saved():
    context = context_of()
    total = torch.zeros(2, 6)
    for seed in range(3):
        context.condition = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed))
        context.balance_loss(torch.full((4,), 0.1 * (seed + 1)))
        for layer in range(2):
            total[layer] += torch.bincount(context.routing.chosen[layer].flatten(), minlength=6)
    torch.testing.assert_close(context.share, total / (3 * 4 * 2))
    torch.testing.assert_close(context.severity_mean, torch.tensor(0.2))
    assert {"share", "severity_mean", "images_seen"} <= set(context.state_dict())
    before = context.share.clone()
    context.balance_loss(torch.full((4,), 0.9), update=False)
    context.eval().balance_loss(torch.full((4,), 0.9))
    assert torch.equal(context.share, before)


def test_micro_batches_before_one_backward_pass():
    context = context_of()
    losses = []
    for seed in range(2):
        context.condition = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed))
        losses.append(context.balance_loss(torch.rand(4)))
    sum(losses).backward()
    assert context.weight.grad.abs().sum() > 0


def test_loss_alone_orders_zero_slots_by_severity_at_batch_one():
    context = context_of(balance_alpha=1.0)
    nn.init.normal_(context.weight, std=0.02)
    optimizer = torch.optim.Adam(context.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        severity = torch.rand(1, generator=generator)
        context.condition = (severity[:, None] - 0.5) * 3.5
        loss = context.balance_loss(severity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    context.eval()
    zeros = []
    for severity in (0.1, 0.9):
        context.condition = torch.full((1, 1), (severity - 0.5) * 3.5)
        zeros.append((context.routing.chosen >= 4).float().sum(-1).mean().item())
    assert zeros[0] > zeros[1]
    assert zeros[1] == 0


def test_no_dead_slot_after_noisy_steps():
    context = context_of(num_ranks=34, num_zero=4, top_k=8)
    nn.init.normal_(context.weight, std=0.02)
    context.noise_sigma = 1.0
    optimizer = torch.optim.Adam(context.parameters(), lr=1e-3)
    for _ in range(200):
        severity = torch.rand(4)
        context.condition = severity[:, None] - 0.5
        loss = context.balance_loss(severity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    uniform = 1 / context.config.num_slots
    assert context.share.min() > uniform / 10


def test_router_gradient_is_zero_at_the_first_step_and_not_at_the_second():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    report = inject(model, MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=["0"]), condition_dim=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sizes = []
    for _ in range(2):
        report.context.condition = torch.randn(3, 2)
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        sizes.append(report.context.weight.grad.abs().sum().item())
        optimizer.step()
    assert sizes[0] == 0.0
    assert sizes[1] > 0.0


def test_bad_severity():
    context = context_of()
    with pytest.raises(InputError, match=r"set context\.condition"):
        context.balance_loss(torch.ones(4))
    context.condition = torch.randn(4, 1)
    with pytest.raises(InputError, match=r"expected \(4,\)"):
        context.balance_loss(torch.ones(3))
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            context.balance_loss(torch.tensor([0.5, 0.5, 0.5, bad]))
    assert context.images_seen == 0


def test_standardization_is_checked_and_used():
    context = context_of()
    assert not context.standardized
    context.set_standardization(torch.tensor([2.0]), torch.tensor([4.0]))
    logits = context.logits(torch.tensor([[10.0]]))
    torch.testing.assert_close(logits[:, 0], 2 * context.weight[..., 0] + context.bias)
    assert context.standardized
    context.set_standardization(torch.tensor([2.0]), torch.tensor([9e-5]))
    torch.testing.assert_close(context.std, torch.ones(1), msg="a flat score is centred, not blown up")
    with pytest.raises(InputError, match="mean: expected 1 finite"):
        context.set_standardization(torch.tensor([float("inf")]), torch.tensor([1.0]))
    with pytest.raises(InputError, match="std"):
        context.set_standardization(torch.tensor([0.0]), torch.tensor([-1.0]))


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    report = inject(
        model, MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=["0", "2"]), condition_dim=1
    )
    for name in ("0", "2"):
        nn.init.normal_(model.get_submodule(name).sets["generator"].up)
    nn.init.normal_(report.context.weight)
    return model.train(), report.context


def one_step(model, context, scores, images):
    context.condition = scores
    loss = model(images).square().mean() + context.balance_loss(scores.flatten().sigmoid())
    loss.backward()


def _device(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        context = context_of()
        data = torch.Generator().manual_seed(5)
        scores, severity = torch.randn(2, 4, 1, generator=data), torch.rand(2, 4, generator=data)
        context.condition = scores[rank]
        loss = context.balance_loss(severity[rank])
        loss.backward()
        gradient = context.weight.grad.clone()
        dist.all_reduce(gradient)
        model, own = small_model()
        images = torch.randn(8, 3, 4, 4, generator=data).chunk(2)[rank]
        # No flag for unused parameters: every rank and the router get a gradient in every step.
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            one_step(parallel, own, scores[rank], images)
        gradients = {f"ddp.{key}": value.grad for key, value in model.named_parameters() if value.requires_grad}
        if rank == 0:
            torch.save({"gradient": gradient / 2, **gradients, **context.state_dict()}, f"{folder}/results.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_devices_equal_one_with_both_batches(tmp_path):
    # DDP keeps gloo's threads alive past the end of the group, and an interpreter that shuts down under them may abort.
    # The children of a fork server leave without shutting down.
    mp.start_processes(_device, (str(tmp_path),), nprocs=2, start_method="forkserver")
    two = torch.load(tmp_path / "results.pt", weights_only=True)
    context = context_of()
    data = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 4, 1, generator=data).flatten(0, 1)
    context.condition = scores
    context.balance_loss(torch.rand(2, 4, generator=data).flatten()).backward()
    torch.testing.assert_close(two["gradient"], context.weight.grad)
    for key in ("share", "severity_mean", "images_seen"):
        torch.testing.assert_close(two[key], context.state_dict()[key])
    model, own = small_model()
    images = torch.randn(8, 3, 4, 4, generator=data)
    for _ in range(2):
        model.zero_grad()
        one_step(model, own, scores, images)
    expected = {f"ddp.{key}": value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert len(expected) == 2 * 2 + 2
    for key, gradient in expected.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-6)
