"""The choice of slots and the three forms of their gates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morsr.functional.routing import effective_ranks, gate_mass, route, slot_load

GATES = ("renormalize_real", "softmax", "renormalize")


@st.composite
def logits(draw):
    layers, batch, slots = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    seed, spread = draw(st.integers(0, 999)), draw(st.sampled_from([0.0, 0.01, 1.0, 60.0]))
    values = torch.randn(layers, batch, slots, generator=torch.Generator().manual_seed(seed)) * spread
    return values, draw(st.integers(1, slots)), draw(st.integers(1, slots))


@settings(deadline=None, max_examples=60)
@given(logits(), st.sampled_from(GATES))
def test_exactly_k_slots_are_chosen_and_gates_are_finite(case, gate):
    values, top_k, real = case
    routing = route(values, top_k, real, gate=gate)
    assert routing.chosen.shape[-1] == top_k
    assert (slot_load(routing.chosen, values.shape[-1]) <= values.shape[1]).all()
    assert routing.gates.isfinite().all()
    assert (routing.gates >= 0).all()
    outside = torch.ones_like(values, dtype=torch.bool).scatter(-1, routing.chosen, False)
    assert (routing.gates[outside] == 0).all()
    smallest = values.gather(-1, routing.chosen).amin(-1, keepdim=True)
    assert (values[outside.view_as(values)] <= smallest.expand_as(values)[outside]).all()


@settings(deadline=None, max_examples=60)
@given(logits())
def test_gates_over_real_slots_sum_to_their_number(case):
    values, top_k, real = case
    routing = route(values, top_k, real, gate="renormalize_real")
    count = (routing.chosen < real).sum(-1).float()
    torch.testing.assert_close(gate_mass(routing.gates, real), count)
    assert (routing.gates[..., real:] == 0).all()
    assert (effective_ranks(routing.gates, real) <= count + 1e-3).all()


def test_confident_zero_slots_take_places_but_no_mass():
    """The fault of the form of release 0.1: 50 nats ahead, zero slots left the real ranks nothing."""
    values = torch.zeros(1, 1, 6)
    values[..., 4:] = 50.0
    values[..., 0] = 1.0
    real = route(values, 4, 4, gate="renormalize_real")
    assert gate_mass(real.gates, 4).item() == pytest.approx(2.0)
    assert gate_mass(route(values, 4, 4, gate="renormalize").gates, 4).item() < 1e-6
    all_zero = route(values, 2, 4, gate="renormalize_real")
    assert gate_mass(all_zero.gates, 4).item() == 0.0


def test_zero_slots_get_no_gradient_of_the_task():
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = route(values, 5, 6, gate="renormalize_real")
    (routing.gates * torch.arange(8.0)).sum().backward()
    assert (values.grad[..., 6:] == 0).all()
    assert values.grad[..., :6].abs().sum() > 0


def test_ties_go_to_the_lowest_slots_and_even_gates_are_one():
    routing = route(torch.zeros(1, 2, 7), 3, 7)
    assert routing.chosen.tolist() == [[[0, 1, 2]] * 2]
    torch.testing.assert_close(routing.selected, torch.ones(1, 2, 3))


def test_noise_moves_the_choice_and_not_the_probabilities():
    values, noise = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, 0.0, 5.0]]])
    routing = route(values, 1, 4, noise=noise)
    assert routing.chosen.item() == 3
    torch.testing.assert_close(routing.probabilities, torch.full((1, 1, 4), 0.25))
