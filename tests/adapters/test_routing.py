from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morsr.errors import InputError
from morsr.functional.routing import chosen_ranks, limit_experts, rank_gates, route, slot_load

FEW = settings(max_examples=25, deadline=None)


@st.composite
def cases(draw):
    experts, zero, shared = draw(st.integers(1, 9)), draw(st.integers(0, 4)), draw(st.integers(0, 3))
    return {
        "logits": torch.randn(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 4)),
            experts + zero,
            generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        ),
        "k": draw(st.integers(1, experts + zero)),
        "shape": (experts, shared, draw(st.integers(1, 3))),
    }


@FEW
@given(cases())
def test_exactly_k_slots_and_gates_that_sum_to_k(case):
    routing = route(case["logits"], case["k"])
    assert ((routing.gates > 0).sum(-1) == case["k"]).all()
    torch.testing.assert_close(routing.gates.sum(-1), torch.full(routing.gates.shape[:2], float(case["k"])))
    torch.testing.assert_close(routing.gates.gather(-1, routing.chosen), routing.selected)
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(routing.gates.shape[:2]))


@FEW
@given(cases())
def test_gathered_ranks_and_masked_gates_are_the_same_gates(case):
    experts, shared, width = case["shape"]
    routing = route(case["logits"], case["k"])
    masked = rank_gates(routing, *case["shape"])
    ranks, factors = chosen_ranks(routing, *case["shape"])
    assert ranks.shape[-1] == shared + case["k"] * width
    assert int(ranks.max()) < shared + experts * width
    torch.testing.assert_close(torch.zeros_like(masked).scatter_add(-1, ranks, factors), masked)
    assert (masked[..., :shared] == 1).all()
    # A chosen zero slot runs nothing: what works is k less the zero slots, times the ranks of an expert.
    zeros = (routing.chosen >= experts).sum(-1)
    assert torch.equal((factors[..., shared:] != 0).sum(-1), (case["k"] - zeros) * width)


@FEW
@given(cases())
def test_load_sums_to_choices(case):
    logits = case["logits"]
    load = slot_load(route(logits, case["k"]).chosen, logits.shape[-1])
    torch.testing.assert_close(load.sum(-1), torch.full((logits.shape[0],), float(logits.shape[1] * case["k"])))


@FEW
@given(cases(), st.integers(0, 6), st.floats(0, 2))
def test_knobs(case, budget, generative):
    experts = case["shape"][0]
    routing = route(case["logits"], case["k"])
    limited = limit_experts(routing, experts, budget=budget, generative=generative)
    real, before = limited.gates[..., :experts], routing.gates[..., :experts]
    assert ((real > 0).sum(-1) <= budget).all()
    kept = real > 0
    torch.testing.assert_close(real[kept], before[kept] * generative)
    if generative > 0:
        # Those that were dropped have smaller gates than those that stayed.
        dropped = torch.where((before > 0) & ~kept, before, 0).amax(-1)
        stayed = torch.where(kept, before, float("inf")).amin(-1)
        assert (dropped <= stayed).all()


def test_ties_go_to_the_lowest_slot():
    routing = route(torch.zeros(2, 3, 7), 3)
    assert torch.equal(routing.chosen, torch.tensor([0, 1, 2]).expand(2, 3, 3))
    torch.testing.assert_close(routing.selected, torch.ones(2, 3, 3))


def test_softmax_gates_are_the_probabilities_as_they_are():
    logits = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    routing = route(logits, 2, normalization="softmax")
    torch.testing.assert_close(routing.selected, routing.probabilities.gather(-1, routing.chosen))


def test_noise_moves_the_choice_and_not_the_probabilities():
    logits = torch.zeros(1, 1, 5)
    noise = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0]).view(1, 1, 5)
    routing = route(logits, 1, noise=noise)
    assert routing.chosen.item() == 4
    torch.testing.assert_close(routing.probabilities, torch.full((1, 1, 5), 0.2))


def test_a_routing_moves_and_keeps_its_dtypes():
    routing = route(torch.randn(2, 3, 5), 2)
    for moved in (routing.to("cpu"), routing.to(torch.device("meta"), non_blocking=True)):
        assert [field.dtype for field in moved] == [torch.float32, torch.int64, torch.float32, torch.float32]
    assert moved.gates.device.type == "meta"
    with pytest.raises(InputError, match=r"expected a device to move to, got torch\.float16"):
        routing.to(torch.float16)


def test_image_keeps_a_batch_dimension():
    routing = route(torch.randn(2, 3, 5), 2)
    one = routing.image(-1)
    assert one.batch == 1
    torch.testing.assert_close(one.gates[:, 0], routing.gates[:, 2])
