"""The balance loss, its running share of choices, and what they teach a router."""

import pytest
import torch

from morsr.adapters import MoRConfig, Router
from morsr.functional.losses import balance_loss


def _router(layers: int = 2, **settings) -> Router:
    torch.manual_seed(0)
    config = MoRConfig(num_ranks=8, num_shared=2, top_k=2, num_zero=2, **settings)
    return Router(config, layers, 3).train()


def test_formula_by_hand():
    """N α (Σ real f_i mean p_i + Σ zero f_i mean w p_i), one layer, two images."""
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    share, weight = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([2.0, 0.5])
    expected = 3 * 0.1 * (0.5 * 0.3 + 0.25 * 0.2 + 0.25 * (2.0 * 0.2 + 0.5 * 0.8) / 2)
    got = balance_loss(p, share, weight, 2, alpha=0.1)
    assert got.item() == pytest.approx(expected)


def test_collapsed_layer_is_seen_even_when_the_mean_over_layers_is_even():
    one, other = torch.eye(2)[:1], torch.eye(2)[1:]
    collapsed = torch.stack([one, other])  # each layer sends every image to another slot
    even = torch.full((2, 1, 2), 0.5)
    loss = balance_loss(collapsed, collapsed.mean(1), None, 2, alpha=1.0)
    assert loss > 1.9 * balance_loss(even, even.mean(1), None, 2, alpha=1.0)


def test_running_share_counts_choices_and_sums_to_one():
    router = _router(balance_window=10**9)
    seen = torch.zeros(2, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        routing = router(torch.rand(4, 3))
        router.balance_loss(routing, torch.rand(4))
        seen += torch.stack([torch.bincount(layer.flatten(), minlength=8) for layer in routing.chosen])
    torch.testing.assert_close(router.share, seen / (20 * 2))
    torch.testing.assert_close(router.share.sum(-1), torch.ones(2))
    assert router.images_seen.item() == 20


def test_the_loss_takes_the_running_share_and_the_rank_of_the_severity():
    router = _router(balance_window=10**9)
    router.standardize(torch.zeros(3), torch.full((3,), 0.5), torch.tensor([0.8, 0.85, 0.9]))
    routing, severity = router(torch.rand(4, 3)), torch.tensor([0.8, 0.825, 0.85, 0.9])
    found = router.balance_loss(routing, severity)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0])
    wanted = balance_loss(
        routing.probabilities, router.share, weight, router.config.num_experts, alpha=router.config.balance_alpha
    )
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)


def test_noise_on_the_logits_is_for_training_only():
    router, scores = _router(), torch.rand(16, 3)
    router.noise_sigma = 1.0
    assert not router(scores).gates.equal(router(scores).gates)
    router.eval()
    assert router(scores).gates.equal(router(scores).gates)


def _trained(balance: str, severity_of: torch.Tensor, *, batch: int) -> tuple[float, float]:
    """Zero slots of light and of severe images after a router has learned from the balance loss alone."""
    config = MoRConfig(num_ranks=18, num_shared=2, top_k=4, num_zero=4, balance=balance, balance_alpha=1.0)
    torch.manual_seed(0)
    router = Router(config, 1, 1).train()
    router.standardize(severity_of.mean()[None], severity_of.std()[None])
    optimizer = torch.optim.Adam(router.parameters(), lr=5e-2)
    for step in range(150):
        severity = severity_of[(torch.arange(batch) + step * batch) % len(severity_of)]
        optimizer.zero_grad()
        router.balance_loss(router(severity[:, None]), severity).backward()
        optimizer.step()
    router.eval()
    zero = [(router(torch.tensor([[s]])).chosen >= config.num_experts).sum().item() for s in (0.05, 0.95)]
    return zero[0], zero[1]


@pytest.mark.parametrize("batch", [1, 8])
def test_the_degradation_aware_balance_orders_zero_slots_by_severity(batch):
    severity = torch.rand(256, generator=torch.Generator().manual_seed(1))
    light, severe = _trained("degradation", severity, batch=batch)
    assert light >= severe + 2


def test_a_router_starts_at_random_weights(toy):
    assert Router(toy.small(), 7, 3).weight.std() > 1e-3
