"""Routing tables of a hand-made model whose routing is known: slots are wired to blur, noise and JPEG."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from morsr.errors import ConfigError, InputError
from morsr.evaluation.inputs import unique_names
from morsr.evaluation.routing import RoutingTable
from morsr.functional.routing import route

KINDS = ("blur", "jpeg", "noise")
LAYERS, SLOTS, ZERO, TOP_K = 2, 14, 2, 4
# Layer 0 answers blur, JPEG and noise with slots 0, 1 and 2; layer 1 with slots 7, 4 and 9.
WIRED = ((0, 1, 2), (7, 4, 9))


class Estimator(nn.Module):
    """Reads the scores off the mean of each colour channel, so that a test can paint them."""

    def forward(self, lr: Tensor) -> Any:
        scores = lr.mean((2, 3))
        return SimpleNamespace(scores=scores, severity=scores.amax(1), names=KINDS)


class Context(nn.Module):
    def __init__(self, *, is_routed: bool = True) -> None:
        super().__init__()
        self.layer_names = ("unet.down_blocks.0.a", "unet.up_blocks.1.b")
        self.config = SimpleNamespace(
            num_slots=SLOTS, num_zero=ZERO, num_shared=3, top_k=TOP_K, expert_rank=1, is_routed=is_routed
        )
        self.is_routed = is_routed
        self.weight = torch.zeros(LAYERS, SLOTS, 3)
        for layer, slots in enumerate(WIRED):
            for kind, slot in enumerate(slots):
                self.weight[layer, slot, kind] = 40
        self.weight[:, SLOTS - ZERO :] = -8  # zero slots for images without much degradation

    @property
    def router(self) -> Context:
        return self

    def forward(self, scores: Tensor) -> Any:
        logits = torch.einsum("bd,lnd->lbn", scores, self.weight)
        # A wired slot is worth a look above half of the score; noise decides among the rest.
        logits = logits - 20 * (self.weight.amax(-1) > 0)[:, None] + torch.rand_like(logits)
        logits[..., SLOTS - ZERO :] += 5
        return route(logits, TOP_K, SLOTS - ZERO, gate="renormalize")


class Generator(nn.Module):
    def __init__(self, *, is_routed: bool = True) -> None:
        super().__init__()
        self.estimator = Estimator()
        self.adapters = Context(is_routed=is_routed)


def painted(count: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """Images whose channels carry one strong kind of degradation each, and the severities by kind."""
    severity = 0.2 * torch.rand(count, 3)
    severity[torch.arange(count), torch.arange(count) % 3] = 0.7 + 0.3 * torch.rand(count)
    images = severity[:, :, None, None].expand(-1, -1, 6, 6).contiguous()
    return images, dict(zip(KINDS, severity.unbind(1), strict=True))


def test_specialisation_finds_exactly_the_wiring():
    images, truth = painted()
    table = RoutingTable.from_images(Generator(), images, truth)
    assert table.kinds_are_known
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


def test_without_a_relation_nothing_is_found():
    images, _ = painted(384)
    labels = ["a", "b", "c", "d"] * 96
    context = Generator()
    context.adapters.weight.zero_()
    found = RoutingTable.from_images(context, images, labels=labels).specialisation()
    assert found.top() == []
    # Uncorrected, chance alone would show as 3 / (2 * 384 * log 2) = 0.0056 bits.
    assert abs(found.information[:, : SLOTS - ZERO].mean().item()) < 0.0028
    assert (found.information[:, SLOTS - ZERO :] == 0).all(), "zero slots are always chosen here"


def test_kinds_fall_back_to_the_scores():
    images, _ = painted()
    table = RoutingTable.from_images(Generator(), images)
    assert not table.kinds_are_known
    assert table.kinds() == tuple(KINDS[index % 3] for index in range(len(images)))


def test_a_high_scale_does_not_win_every_time():
    images = torch.zeros(4, 3, 4, 4)
    truth = {"blur": torch.tensor([0.9, 0.95, 0.92, 0.91]), "noise": torch.tensor([0.1, 0.05, 0.2, 0.3])}
    table = RoutingTable.from_images(Generator(), images, truth)
    assert table.kinds() == ("noise", "blur", "blur", "noise")


def test_loads_ranks_and_groups_agree_with_the_choices():
    images, truth = painted()
    table = RoutingTable.from_images(Generator(), images, truth)
    names, loads = table.heatmap("kind")
    assert names == KINDS
    torch.testing.assert_close(loads.sum(-1), torch.ones(3, LAYERS))
    torch.testing.assert_close(loads.mean(0), table.heatmap()[1][0])  # equally many images of each kind
    noise = loads[names.index("noise")]
    assert noise[0, 2].item() == pytest.approx(1 / TOP_K)
    assert table.heatmap("severity")[0] == ("light", "medium", "severe")
    counted = (table.chosen < table.num_real).sum(-1) + 3
    torch.testing.assert_close(table.active_ranks(), counted.float())
    with pytest.raises(InputError, match="expected None"):
        table.heatmap("colour")


def test_sizes_may_differ_and_the_order_stays(tmp_path: Path):
    colours = [(250, 10, 20), (5, 240, 10), (0, 0, 255), (250, 0, 0)]
    paths = []
    for index, colour in enumerate(colours):
        paths.append(tmp_path / f"photo{index}.png")
        Image.new("RGB", (8 + 4 * (index % 2), 8), colour).save(paths[-1])
    table = RoutingTable.from_images(Generator(), paths)
    assert table.names == ("photo0", "photo1", "photo2", "photo3")
    torch.testing.assert_close(table.scores, torch.tensor(colours) / 255)


def test_a_file_holds_the_whole_table(tmp_path: Path):
    images, truth = painted(12)
    table = RoutingTable.from_images(Generator(), images, truth, labels=["x", "y"] * 6)
    table.save(tmp_path / "routing.safetensors")
    again = RoutingTable.load(tmp_path / "routing.safetensors")
    for name in ("names", "layer_names", "score_names", "labels", "num_slots", "num_zero", "num_shared", "expert_rank"):
        assert getattr(again, name) == getattr(table, name)
    for name in ("scores", "severity", "chosen", "gates"):
        torch.testing.assert_close(getattr(again, name), getattr(table, name), rtol=0, atol=0)
    torch.testing.assert_close(again.truth["jpeg"], truth["jpeg"])
    joined = RoutingTable.concatenate([table, again])
    assert len(joined) == 24
    torch.testing.assert_close(joined.loads(), table.loads())


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path):
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match="cannot be read as a routing table"):
        RoutingTable.load(tmp_path / "half.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected a routing table"):
        RoutingTable.load(tmp_path / "other.safetensors")


def test_dataframe_has_a_row_per_choice():
    pytest.importorskip("pandas")
    images, truth = painted(9)
    table = RoutingTable.from_images(Generator(), images, truth, names=["same"] * 9)
    frame = table.to_dataframe()
    assert len(frame) == 9 * LAYERS * TOP_K
    assert frame["image"].nunique() == 9, "images of one name stay apart"
    one = frame[(frame["image"] == "same (5)") & (frame["layer"] == "unet.up_blocks.1.b")]
    assert one["slot"].tolist() == table.chosen[4, 1].tolist()
    assert one["true_noise"].iloc[0] == pytest.approx(truth["noise"][4].item())
    assert frame["kind"].iloc[0] == "blur"


def test_names_are_made_different_whatever_they_are():
    assert unique_names(["a", "a", "b", "a"]) == ["a", "a (2)", "b", "a (3)"]
    for names in (["a", "a", "a (2)"], ["a (2)", "a", "a", "a"]):
        assert len(set(unique_names(names))) == len(names)


def test_bad_input_is_named():
    images, truth = painted(6)
    with pytest.raises(ConfigError, match="no routing"):
        RoutingTable.from_images(Generator(is_routed=False), images)
    with pytest.raises(InputError, match="at least one image"):
        RoutingTable.from_images(Generator(), [])
    with pytest.raises(InputError, match="labels: expected 6"):
        RoutingTable.from_images(Generator(), images, labels=["a"])
    with pytest.raises(InputError, match="blur: expected 5"):
        RoutingTable.from_images(Generator(), images[:5], truth)
    with pytest.raises(InputError, match="needs at least 8 images of 2 kinds"):
        RoutingTable.from_images(Generator(), images[:1]).specialisation()
