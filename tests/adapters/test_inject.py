"""Which layers are adapted, what is refused, and how sets are switched."""

import pytest
import torch
from torch import nn

from morsr.adapters import MoRConfig, active_adapters, adapter_parameters, inject, merged
from morsr.adapters.inject import layers_of_set, plain_state_dict
from morsr.errors import ConfigError, InputError


class Odd(nn.Module):
    """Layers that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(4, 4, 3)
        self.subclass = type("Mine", (nn.Linear,), {})(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 1)
        self.encoder = nn.TransformerEncoderLayer(4, 1, 8)  # in evaluation it reads weights itself
        self.twice = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.tied = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.tied.weight = self.embedding.weight


REFUSED = ["grouped", "reflected", "transposed", "subclass", "normed", "spectral", "tied"]
REFUSED += [r"attention\.out_proj", r"encoder\.linear1", r"twice\.\d"]


@pytest.mark.parametrize("target", [*REFUSED, "nothing", "plai", "lain", "embedding", "(", "nonesuch@plain"])
def test_targets_that_cannot_be_adapted_are_refused_by_name(target):
    model = Odd()
    before = list(model.state_dict())
    config = MoRConfig.lora(2, targets=["plain", target])
    with pytest.raises(ConfigError, match=target.split("\\")[0].replace("(", r"\(")):
        inject(model, config)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_ranks": 0},
        {"num_shared": 99},
        {"top_k": 13},
        {"num_zero": -1},
        {"expert_rank": 3},
        {"gate": "hard"},
        {"balance_alpha": -1.0},
        {"targets": []},
        {"targets": [""]},
        {"topk": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_be(toy, settings):
    with pytest.raises(ConfigError):
        toy.small(**settings)


def test_targets_match_whole_names_and_dotted_suffixes(toy):
    _, report = toy.make(targets=("conv_in", r"head\.0"))
    assert report.layer_names == ("conv_in", "head.0")
    assert set(report.skipped) == {"downsample", "dilated", "shortcut", "to_q", "pooled"}
    assert "conv_in" in str(report)


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(4, 3), torch.rand(4)), (nn.Conv2d(2, 3, 3), torch.rand(2, 6, 5))])
def test_an_input_without_a_batch_keeps_its_shape(layer, x):
    model = nn.Sequential(layer)
    report = inject(model, MoRConfig(num_ranks=4, num_shared=1, top_k=2, num_zero=1, targets=("0",)), condition_dim=2)
    nn.init.normal_(model[0].sets["generator"].lora_B)
    report.route(torch.rand(1, 2))
    torch.testing.assert_close(model(x), model(x[None])[0])
    torch.testing.assert_close(model[0](input=x), model(x))
    report.route(torch.rand(2, 2))
    with pytest.raises(InputError):
        model(x)


def test_two_sets_work_one_at_a_time(toy, images, scores):
    model, report = toy.make()
    inject(model, toy.small("lora", num_ranks=3), name="score")
    toy.fill(model, "score")
    assert list(report.switch.reports) == ["generator", "score"]
    report.route(scores)
    with torch.no_grad():
        first = model(images)
        with active_adapters(model, "score"):
            second = model(images)
        with active_adapters(model, None):
            bare = model(images)
        again = model(images)
    torch.testing.assert_close(bare, toy.bare()(images))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(second, bare)
    mine = {id(p) for p in adapter_parameters(model)}
    assert not mine & {id(p) for p in adapter_parameters(model, "score")}


def test_strength_scales_routed_ranks_alone(toy, images, scores):
    model, report = toy.make()
    report.route(scores)
    with torch.no_grad():
        full = model(images)
        report.strength = 0.0
        shared = model(images)
        for _, _, ranks in layers_of_set(model, "generator"):
            ranks.lora_B[:, 2:] = 0
        report.strength = 1.0
        torch.testing.assert_close(model(images), shared)
    assert not torch.equal(full, shared)
    for wrong in (-1, float("nan"), True, "1"):
        with pytest.raises(ConfigError):
            report.strength = wrong


@pytest.mark.parametrize(
    "scores", [torch.rand(3), torch.rand(2, 4), torch.ones(2, 3).long(), torch.full((1, 3), torch.nan)]
)
def test_scores_that_cannot_be(toy, scores):
    _, report = toy.make()
    with pytest.raises(InputError):
        report.route(scores)
    assert report.routing is None


def test_what_a_model_refuses_to_do(toy, images, scores):
    model, report = toy.make()
    with pytest.raises(InputError, match="route"):
        model(images)  # no routing yet
    report.route(scores)
    with pytest.raises(InputError, match="3 images"):
        model(images[:2])
    with pytest.raises(InputError), merged(model):
        pass  # of three images
    with pytest.raises(ConfigError), active_adapters(model, "other"):
        pass
    with pytest.raises(ConfigError):
        inject(model, toy.small(), condition_dim=3)  # the name is taken
    with pytest.raises(ConfigError):
        inject(toy.Toy(), toy.small())  # no scores
    part = nn.Sequential(toy.make()[0], toy.make()[0])
    with pytest.raises(ConfigError, match="whole model"):
        inject(part, toy.small("lora"), name="score")


def test_while_merged_nothing_else_runs(toy, images, scores):
    model, report = toy.make()
    report.route(scores[:1])
    with merged(model), torch.no_grad():
        for forbidden in (lambda: report.route(scores), lambda: merged(model).__enter__()):
            with pytest.raises(ConfigError):
                forbidden()
        with pytest.raises(ConfigError), active_adapters(model, None):
            model(images)
    with active_adapters(model, None), torch.no_grad():
        torch.testing.assert_close(model(images), toy.bare()(images))
    report.router.train()
    with pytest.raises(ConfigError), merged(model):
        pass


def test_a_part_can_be_merged_while_the_rest_is_masked(toy, images, scores):
    model, report = toy.make()
    report.route(scores[:1])
    with torch.no_grad():
        expected = model(images[:1])
        with merged(model.head):
            assert model.head[0].merged == "generator"
            assert model.conv_in.merged is None
            torch.testing.assert_close(model(images[:1]), expected, rtol=1e-4, atol=1e-5)


def test_modules_to_save_are_seen_by_their_set_alone(toy, images, scores):
    model, report = toy.make(modules_to_save=("conv_in", "norm"), filled=False)
    copies = report.copies
    assert list(copies) == ["conv_in", "norm"]
    report.route(scores)
    with torch.no_grad():
        bare = model(images)
        copies["conv_in"].weight.mul_(2)
        copies["norm"].bias.add_(1)
        changed = model(images)
        with active_adapters(model, None):
            assert torch.equal(model(images), bare)
    assert not torch.equal(changed, bare)
    assert all(p in set(adapter_parameters(model)) for p in copies["norm"].parameters())
    plain, with_copies = plain_state_dict(model), plain_state_dict(model, name="generator")
    assert torch.equal(with_copies["conv_in.weight"], 2 * plain["conv_in.weight"])
    report.route(scores[:1])
    with torch.no_grad():
        toy.fill(model)
        expected = model(images[:1])
        with merged(model):
            torch.testing.assert_close(model(images[:1]), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_leaves_out_the_ranks_of_other_sets():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), nn.Linear(4, 4))
    inject(model, MoRConfig.lora(2, targets=["0.0"]), name="first").layers[0].sets["first"].lora_B.data += 1
    x = torch.rand(5, 4)
    inject(model, MoRConfig.lora(2, targets=["1"], modules_to_save=["0"]), name="second")
    with torch.no_grad(), active_adapters(model, None):
        bare = model(x)
    with torch.no_grad(), active_adapters(model, "second"):
        assert torch.equal(model(x), bare)
    assert len(adapter_parameters(model, "second")) == 4


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(300, 40), nn.Conv2d(40, 40, 3)])
def test_gaussian_ranks_start_with_a_deviation_of_one_over_their_number(layer):
    model = nn.Sequential(layer)
    settings = {"num_ranks": 10, "num_shared": 4, "top_k": 2, "num_zero": 1, "targets": ("0",)}
    inject(model, MoRConfig(**settings, init="gaussian"), condition_dim=3)
    up, down = sorted(adapter_parameters(model)[:2], key=lambda parameter: float(parameter.abs().sum()))
    assert up.count_nonzero() == 0
    assert down.std().item() == pytest.approx(1 / 10, rel=0.1)


@pytest.mark.parametrize("patterns", [("nothing",), ("head",)])
def test_modules_to_save_that_cannot_be(toy, patterns):
    with pytest.raises(ConfigError, match="modules_to_save"):
        toy.make(modules_to_save=patterns)
