"""Routing tables of a hand-made model whose routing is known: slots are wired to blur, noise and JPEG."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from morsr.adapters import InjectionReport
from morsr.errors import InputError
from morsr.evaluation.routing import FORMAT, RoutingTable
from morsr.functional.routing import rank_gates, route

KINDS = ("blur", "jpeg", "noise")
LAYERS, SLOTS, ZERO, TOP_K, SHARED = 2, 14, 2, 4, 3
# Layer 0 answers blur, JPEG and noise with slots 0, 1 and 2; layer 1 with slots 7, 4 and 9.
WIRED = ((0, 1, 2), (7, 4, 9))


class Estimator(nn.Module):
    """Reads the scores off the mean of each colour channel, so that a test can paint them."""

    def forward(self, lr: Tensor) -> Any:
        scores = lr.mean((2, 3))
        return SimpleNamespace(scores=scores, severity=scores.amax(1), names=KINDS)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(LAYERS, SLOTS, 3)
        for layer, slots in enumerate(WIRED):
            for kind, slot in enumerate(slots):
                self.weight[layer, slot, kind] = 40
        self.weight[:, SLOTS - ZERO :] = -8  # zero slots for images without much degradation

    def forward(self, scores: Tensor) -> Any:
        logits = torch.einsum("bd,lnd->lbn", scores, self.weight)
        # A wired slot wins above half of the score; noise decides among the rest.
        logits = logits - 20 * (self.weight.amax(-1) > 0)[:, None] + torch.rand_like(logits)
        logits[..., SLOTS - ZERO :] += 5
        return route(logits, TOP_K, SLOTS - ZERO)

    def rank_gates(self, routing: Any) -> Tensor:
        return rank_gates(routing, SLOTS - ZERO, SHARED, 1)


class Generator(nn.Module):
    def __init__(self, *, is_routed: bool = True) -> None:
        super().__init__()
        self.estimator = Estimator()
        ranks = SimpleNamespace(
            lora_A=torch.rand(SHARED + SLOTS - ZERO, 5), lora_B=torch.rand(7, SHARED + SLOTS - ZERO)
        )
        config = SimpleNamespace(
            num_slots=SLOTS, num_zero=ZERO, num_shared=SHARED, top_k=TOP_K, expert_rank=1, num_experts=SLOTS - ZERO
        )
        layers = [SimpleNamespace(sets={"generator": ranks})] * LAYERS
        self.adapters = SimpleNamespace(
            name="generator", is_routed=is_routed, router=Router(), config=config,
            layer_names=("unet.down_blocks.0.a", "unet.up_blocks.1.b"), layers=layers,
        )  # fmt: skip
        self.adapters.routed_update = partial(InjectionReport.routed_update, self.adapters)


def painted(count: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """Images whose channels carry one strong kind of degradation each, and the severities by kind."""
    severity = 0.2 * torch.rand(count, 3)
    severity[torch.arange(count), torch.arange(count) % 3] = 0.7 + 0.3 * torch.rand(count)
    images = severity[:, :, None, None].expand(-1, -1, 6, 6).contiguous()
    return images, dict(zip(KINDS, severity.unbind(1), strict=True))


@pytest.fixture
def table():
    return RoutingTable.from_images(Generator(), *painted())


def test_specialisation_finds_exactly_the_wiring(table):
    found = table.specialisation()
    assert found.kinds == KINDS
    wired = {(layer, slot): kind for layer, slots in enumerate(WIRED) for slot, kind in zip(slots, KINDS, strict=True)}
    top = found.top(50)
    assert set(top) == set(wired), "the wired slots and no other"
    for layer, slot in top:
        assert found.kinds[found.kind[layer, slot]] == wired[layer, slot]
        # "Chosen or not" splits a third off: H(1/3) = 0.918 bits.
        assert found.information[layer, slot].item() == pytest.approx(0.918, abs=0.03)
        assert found.lift[layer, slot].item() == pytest.approx(3, abs=0.01)
    assert found.top(50, kind="noise") == sorted([(0, 2), (1, 9)], key=top.index)


def test_the_image_that_shows_a_kind_has_little_of_the_others(table):
    shown = table.typical()
    assert {kind: table.kinds()[row] for kind, row in shown.items()} == {kind: kind for kind in KINDS}
    assert table.truth["blur"][shown["blur"]] > table.truth["blur"].quantile(0.9)


def test_a_score_that_the_others_make_up_is_no_kind(table):
    scores = torch.cat([table.scores, table.scores.mean(1, keepdim=True)], dim=1)
    more = replace(table, truth={}, scores=scores, score_names=(*KINDS, "overall"))
    assert more.kinds() == replace(table, truth={}).kinds()


def test_without_a_relation_nothing_is_found():
    generator = Generator()
    generator.adapters.router.weight.zero_()
    blind = RoutingTable.from_images(generator, painted(384)[0], painted(384)[1])  # of other images
    found = blind.specialisation()
    assert found.top() == []
    # Uncorrected, chance alone would show as 2 / (2 * 384 * log 2) = 0.0038 bits.
    assert abs(found.information[:, : SLOTS - ZERO].mean().item()) < 0.0019
    assert (found.information[:, SLOTS - ZERO :] == 0).all(), "zero slots are always chosen here"


def test_counts_masses_and_groups_agree_with_the_choices(table):
    names, loads = table.heatmap("kind")
    assert names == KINDS
    torch.testing.assert_close(loads.sum(-1), torch.ones(3, LAYERS))
    torch.testing.assert_close(loads.mean(0), table.loads())  # equally many images of each kind
    assert loads[names.index("noise"), 0, 2].item() == pytest.approx(1 / TOP_K)
    assert table.heatmap("severity")[0] == ("light", "medium", "severe")
    counted = (table.chosen < table.num_real).sum(-1).float()
    torch.testing.assert_close(table.active_ranks(), counted + SHARED)
    torch.testing.assert_close(table.gate_mass(), counted)  # chosen real gates sum to their number
    effective = table.effective_ranks()
    assert (effective <= counted + 1e-5).all()
    gates = table.gates[0, 0][table.chosen[0, 0] < table.num_real].double()
    share = gates / gates.sum()
    assert effective[0, 0].item() == pytest.approx(
        (-(share * share.clamp_min(1e-300).log()).sum()).exp().item(), rel=1e-4
    )
    even = replace(table, gates=torch.ones_like(table.gates))
    torch.testing.assert_close(even.effective_ranks(), counted)


def test_update_sizes_are_norms_of_the_weight_updates():
    generator = Generator()
    table = RoutingTable.from_images(generator, painted(5)[0])
    ranks = generator.adapters.layers[0].sets["generator"]
    down, up = ranks.lora_A.double(), ranks.lora_B.double()
    for image in range(5):
        gates = torch.zeros(SLOTS, dtype=torch.float64).scatter(
            0, table.chosen[image, 1], table.gates[image, 1].double()
        )
        routed = (up[:, SHARED:] * gates[: SLOTS - ZERO]) @ down[SHARED:]
        expected = routed.norm() / (up[:, :SHARED] @ down[:SHARED]).norm()
        assert table.update[image, 1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_plot_shows_layers_and_sorted_slots(table):
    order = table.slot_order()
    assert (order.sort(1).values == torch.arange(SLOTS)).all()
    assert order[:, SLOTS - ZERO :].tolist() == [[12, 13]] * LAYERS
    for layer, slots in enumerate(WIRED):  # blur's slot first, then JPEG's, then noise's
        places = [order[layer].tolist().index(slot) for slot in slots]
        assert places == sorted(places)
    figure = table.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["all images", *KINDS]
    panel = np.asarray(figure.axes[1].images[0].get_array())
    assert panel.shape == (LAYERS, SLOTS)
    assert panel[0, order[0].tolist().index(0)] == panel[0].max() > 0, "blur's own slot is the reddest"
    figure.savefig("routing.png")


def test_a_file_holds_the_whole_table():
    images, truth = painted(12)
    table = RoutingTable.from_images(Generator(), images, truth)
    table.save("routing.safetensors")
    again = RoutingTable.load("routing.safetensors")
    for name in ("names", "layer_names", "score_names", "num_slots", "num_zero", "num_shared", "expert_rank"):
        assert getattr(again, name) == getattr(table, name)
    for name in ("scores", "severity", "chosen", "gates", "update"):
        torch.testing.assert_close(getattr(again, name), getattr(table, name), rtol=0, atol=0)
    torch.testing.assert_close(again.truth["jpeg"], truth["jpeg"])


def test_a_damaged_or_foreign_file_is_refused():
    Path("half.safetensors").write_bytes(b"\x10\x00")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    for name, table in (("none", None), ("cut", '{"names": '), ("empty", "{}")):
        metadata = {"format": FORMAT} | ({} if table is None else {"table": table})
        save_file({"gates": torch.zeros(1)}, f"{name}.safetensors", metadata)
    for name in ("half", "other", "absent", "none", "cut", "empty"):
        with pytest.raises(InputError):
            RoutingTable.load(f"{name}.safetensors")


def test_dataframe_has_a_row_per_choice():
    pytest.importorskip("pandas")
    images, truth = painted(9)
    table = RoutingTable.from_images(Generator(), images, truth, names=list("abcdefghi"))
    frame = table.to_dataframe()
    assert len(frame) == 9 * LAYERS * TOP_K
    one = frame[(frame["image"] == "e") & (frame["layer"] == "unet.up_blocks.1.b")]
    assert one["slot"].tolist() == table.chosen[4, 1].tolist()
    assert one["true_noise"].iloc[0] == pytest.approx(truth["noise"][4].item())


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ([], {}),
        (painted(6)[0], {"names": ["a"]}),
        (painted(6)[0], {"parameters": {"blur": torch.zeros(5)}}),
        (painted(6)[0], {"parameters": {"blur": torch.full((6,), torch.nan)}}),
    ],
)
def test_bad_input(images, options):
    with pytest.raises(InputError):
        RoutingTable.from_images(Generator(), images, **options)
