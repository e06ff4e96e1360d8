from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from morsr.adapters import (
    MoRConfig,
    active_adapters,
    adapter_parameters,
    auto_merged,
    checkpoint_function,
    inject,
    merged,
)
from morsr.errors import ConfigError, InputError


class Blocks(nn.Module):
    """Three blocks that can be checkpointed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1)) for _ in range(3)
        )
        self.function = None

    def forward(self, hidden):
        for block in self.blocks:
            hidden = self.function(block, hidden) if self.function else block(hidden)
        return hidden


def two_sets(fill_set):
    torch.manual_seed(0)
    model = Blocks()
    targets = [r"blocks\.\d\.[02]"]
    config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=targets)
    generator = inject(model, config, condition_dim=3)
    nn.init.normal_(generator.context.weight)
    inject(model, MoRConfig.of_kind("lora", num_ranks=2, targets=targets), name="score")
    fill_set(model, "generator")
    fill_set(model, "score")
    return model, generator.context


def test_sets_switch_without_copies(fill_set, scores):
    model, context = two_sets(fill_set)
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    inputs = torch.randn(3, 4, 5, 5)
    context.condition = scores
    with torch.no_grad():
        generator = model(inputs)
        with active_adapters(model, "score"):
            score = model(inputs)
            with active_adapters(model, None):
                bare = model(inputs)
            assert torch.equal(model(inputs), score)
        assert torch.equal(model(inputs), generator)
    assert len({output.sum().item() for output in (generator, score, bare)}) == 3
    assert weights == [parameter.data_ptr() for parameter in model.parameters()]
    with (
        pytest.raises(ConfigError, match="no adapter set 'critic'; it has 'generator', 'score'"),
        active_adapters(model, "critic"),
    ):
        pass


def test_switch_is_restored_after_an_error(fill_set, scores):
    model, context = two_sets(fill_set)
    context.condition = scores
    with pytest.raises(ZeroDivisionError), active_adapters(model, "score"):
        raise ZeroDivisionError
    assert model.blocks[0][0].shared.now.active == "generator"


def plain_checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def nested_checkpoint(function, *args):
    return checkpoint(lambda *x: checkpoint(function, *x, use_reentrant=False), *args, use_reentrant=False)


def step(model, context, scores):
    """A training step whose other networks run on the same base, with other routings, before the backward pass."""
    model.zero_grad()
    torch.manual_seed(1)
    inputs = torch.randn(3, 4, 5, 5)
    context.noise_sigma = 0.5
    context.condition = scores
    output = model(inputs)
    with torch.no_grad(), active_adapters(model, None):
        teacher = model(output)
    with active_adapters(model, "score"):
        score = model(output)
    context.condition = scores.flip(0) * 2
    with torch.no_grad():
        model(inputs)
    context.condition = None
    (output.square().mean() + (score - teacher).square().mean()).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "nested", "ours"])
def test_checkpointing_gives_the_same_gradients_though_other_sets_ran_in_between(kind, fill_set, scores):
    model, context = two_sets(fill_set)
    expected = step(model, context, scores)
    functions = {"plain": plain_checkpoint, "nested": nested_checkpoint, "ours": checkpoint_function(model)}
    model.function = functions[kind]
    got = step(model, context, scores)
    assert set(got) == set(expected)
    assert len(expected) == len(adapter_parameters(model)) + len(adapter_parameters(model, "score"))
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=0, atol=0)


def test_state_that_was_forgotten_is_an_error(fill_set, scores):
    model, context = two_sets(fill_set)
    model.function = plain_checkpoint
    context.condition = scores
    model(torch.randn(3, 4, 5, 5))
    output = model(torch.randn(3, 4, 5, 5))
    for _ in range(600):
        context.condition = scores
    with pytest.raises(RuntimeError, match="changed more than"):
        output.sum().backward()


def test_compiles_without_a_graph_break(fill_set, scores):
    model, context = two_sets(fill_set)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(3, 4, 5, 5)
    context.condition = scores
    for _ in range(2):
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)
        # Other routings and another set: no shape depends on the data, so this compiles at most once more.
        context.condition = scores.flip(0)
    with active_adapters(model, "score"):
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    for seed in range(3):
        context.condition = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))
        compiled(inputs).sum().backward()
    assert counters["stats"]["unique_graphs"] == before


def test_compiled_blocks_under_our_checkpoint_function(fill_set, scores):
    model, context = two_sets(fill_set)
    expected = step(model, context, scores)
    run = checkpoint_function(model)
    compiled = {id(block): torch.compile(block, backend="aot_eager") for block in model.blocks}
    model.function = lambda block, hidden: run(compiled[id(block)], hidden)
    got = step(model, context, scores)
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)


def test_parts_adapted_apart_share_one_state_once_adapted_together(fill_set, scores):
    model = nn.ModuleDict({"a": Blocks(), "b": Blocks()})
    config = MoRConfig(num_ranks=4, num_shared=2, top_k=1, num_zero=1, targets=[r"blocks\.\d\.0"])
    first = inject(model["a"], config, condition_dim=3, name="one").context
    inject(model["b"], config, condition_dim=3, name="two")
    with pytest.raises(ConfigError, match="adapted separately"), active_adapters(model, "one"):
        pass
    with active_adapters(model["b"], None):
        lora = MoRConfig.of_kind("lora", num_ranks=2, targets=[r"[ab]\.blocks\..*"])
        third = inject(model, lora, name="three").context
    assert len(third.layer_names) == 12
    first.condition = scores
    with active_adapters(model, "three"):
        assert model["a"].blocks[0][0].shared.now.active == model["b"].blocks[0][0].shared.now.active == "three"
    assert model["b"].blocks[0][0].shared.now.active == "one"
    with pytest.raises(ConfigError, match="'two' exists on another part"):
        inject(model["a"], config, condition_dim=3, name="two")


@torch.no_grad()
def test_merge_restores_bits_and_follows_the_routing(fill_set, scores):
    model, context = two_sets(fill_set)
    model.eval()
    inputs = torch.randn(1, 4, 5, 5)
    before = [parameter.clone() for parameter in model.parameters()]
    context.condition = scores[:1]
    first = model(inputs)
    routing = context.routing
    with merged(model) as merge:
        torch.testing.assert_close(model(inputs), first, rtol=1e-4, atol=1e-5)
        assert merge.backup_bytes == sum(block[0].weight.nbytes + block[2].weight.nbytes for block in model.blocks)
        assert merge.ranks_most == 6 * (2 + 2)
        zeros = (routing.chosen >= context.config.num_experts).sum().item()
        assert merge.ranks_run == merge.ranks_most - zeros
        context.routing = routing
        assert merge.merges == 1
        context.condition = scores[1:2]
        assert merge.merges == 2
        second = model(inputs)
        context.generative = 0.0
        assert merge.ranks_run == 6 * 2
        context.generative = 1.0
        with pytest.raises(ConfigError, match="is merged into the weights"), active_adapters(model, None):
            pass
        with pytest.raises(ConfigError, match="merged already"), merged(model):
            pass
        with pytest.raises(InputError, match="for 3"):
            context.condition = scores
        with pytest.raises(InputError, match="no routing"):
            model(inputs)
        context.condition = None
        with pytest.raises(InputError, match="no routing"):
            model(inputs)
    context.condition = scores[1:2]
    torch.testing.assert_close(model(inputs), second, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, model.parameters(), before))


@torch.no_grad()
def test_merge_in_bf16_rounds_once(fill_set, scores):
    model, context = two_sets(fill_set)
    model.eval().to(torch.bfloat16)
    context.condition = scores[:1]
    layer = model.blocks[0][0]
    ranks = layer.sets["generator"]
    gates = layer.shared.now.gates["generator"][0]
    exact = layer.weight.double()
    for rank, factor in zip(gates.ranks[0], gates.factors[0], strict=True):
        up, down = ranks.up[rank].double(), ranks.down[rank].double()
        exact = exact + factor.double() * torch.einsum("o,ihw->oihw", up, down)
    with merged(model):
        # One rounding to bf16 moves a value by at most 2^-8 of itself.
        torch.testing.assert_close(layer.weight.double(), exact, rtol=2**-8, atol=1e-6)
    assert layer.weight.dtype == torch.bfloat16


def test_merges_that_cannot_be(fill_set, scores):
    model, context = two_sets(fill_set)
    context.condition = scores
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"), merged(model):
        pass
    model.eval()
    with pytest.raises(InputError, match="for 3"), merged(model):
        pass
    context.condition = None
    with pytest.raises(InputError, match="no routing to merge"), merged(model):
        pass
    with active_adapters(model, None), pytest.raises(ConfigError, match="no adapter set is active"), merged(model):
        pass
    assert model.blocks[0][0].shared.now.active == "generator"
    assert not model.blocks[0][0].shared.now.is_merged


@pytest.mark.parametrize("other_is_adapted", [True, False])
def test_a_weight_of_two_modules_is_never_merged(other_is_adapted, fill_set, scores):
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).eval()
    model[2].weight = model[0].weight
    targets = ("0", "2") if other_is_adapted else ("0",)
    report = inject(model, MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=targets), condition_dim=3)
    fill_set(model)
    report.context.condition = scores[:1, :3]
    x = torch.randn(4, 6)
    before, weight = model(x), model[2].weight if not other_is_adapted else model[2].base_layer.weight
    kept = weight.detach().clone()
    with pytest.raises(ConfigError, match="0 and 2 share one weight"), merged(model):
        pass
    torch.testing.assert_close(weight.detach(), kept, rtol=0, atol=0)
    with auto_merged(model, 1000) as merge:
        assert merge is None
        torch.testing.assert_close(model(x), before)


def test_auto_merges_when_passes_repay_it(fill_set, scores):
    model, context = two_sets(fill_set)
    model.eval()
    context.condition = scores[:1]
    with auto_merged(model, passes=1) as merge:
        assert merge is None
    with auto_merged(model, passes=100) as merge:
        assert merge.merges == 1
        assert model.blocks[0][0].shared.now.is_merged


@torch.no_grad()
def test_hook_of_a_base_layer_keeps_what_it_saw(fill_set, scores):
    model, context = two_sets(fill_set)
    context.condition = scores
    base, inputs = model.blocks[0][0].base_layer, torch.randn(3, 4, 5, 5)
    expected = base(inputs)
    seen = []
    handle = base.register_forward_hook(lambda module, arguments, output: seen.append(output))
    updated = model.blocks[0][0](inputs)
    handle.remove()
    assert torch.equal(seen[0], expected)
    assert torch.equal(model.blocks[0][0](inputs), updated)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_gathered_and_merged_agree_in_every_precision(dtype, bound, fill_set, scores):
    model, context = two_sets(fill_set)
    model.eval().to(dtype)
    inputs = torch.randn(2, 4, 9, 9, dtype=dtype)
    context.condition = scores[:1]
    gathered = model(inputs).double()
    with merged(model):
        difference = model(inputs).double() - gathered
    assert difference.square().mean().sqrt() < bound * gathered.square().mean().sqrt()
