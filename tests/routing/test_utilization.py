"""Statistics of the use of slots, against definitions written out and SciPy."""

import math

import pytest
import torch

from morsr.functional.layer_names import flow_order
from morsr.functional.severity import rank
from morsr.functional.utilization import dead_experts, load_entropy, mutual_information, spearman


def test_the_entropy_of_even_and_collapsed_loads():
    even, collapsed = torch.full((1, 12), 1 / 12), torch.tensor([[1 / 3] * 3 + [0.0] * 9])
    assert load_entropy(even).item() == pytest.approx(1, abs=1e-6)
    assert load_entropy(collapsed).item() == pytest.approx(math.log(3) / math.log(12), abs=1e-6)


def test_dead_experts_are_real_ones_under_a_tenth_of_the_even_load():
    load = torch.tensor([[0.009, 0.011, 0.48, 0.5, *[0.0] * 6]])
    assert dead_experts(load, 4).tolist() == [[True, False, False, False, True, True]]


def test_rank_correlation_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (200,), generator=generator).float()  # many ties
    second = first + 3 * torch.rand(200, generator=generator)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-6)
    expected = (torch.from_numpy(stats.rankdata(first.numpy())) - 0.5) / 200
    torch.testing.assert_close(rank(first).double(), expected, atol=1e-6, rtol=0)


def test_mutual_information_in_bits():
    tables = torch.tensor([[[5, 0], [0, 5]], [[4, 4], [2, 2]], [[0, 0], [0, 0]]])
    torch.testing.assert_close(mutual_information(tables), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def test_layers_in_the_order_of_the_data():
    ordered = [
        "vae.encoder.layers.0", "vae.encoder.layers.3.conv.0", "unet.conv_in", "unet.down_blocks.0.attentions.0.to_q",
        "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.10.resnets.0.conv1", "unet.mid_block.resnets.0.conv1",
        "unet.up_blocks.0.resnets.0.conv1", "unet.conv_out", "other.layer",
    ]  # fmt: skip
    # As diffusers registers them: up before mid, the UNet before the VAE.
    registered = [ordered[i] for i in (2, 3, 4, 5, 7, 6, 8, 0, 1, 9)]
    assert [registered[index] for index in flow_order(registered)] == ordered
