from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from morsr.adapters import AdaptedLayer, MoRConfig, export_lora, import_lora, inject, lora_state_dict
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.functional.routing import Routing

peft = pytest.importorskip("peft")

# peft's ranks on grouped convolutions are another parametrisation, which it cannot merge, and its ranks beside a
# convolution with reflected borders see zeros there.
PLAIN = ("conv_in", "downsample", "shortcut", "to_q", "pooled", r"head\.0")


def peft_twin(toy, model):
    """The same network and ranks in peft: the oracle."""
    torch.manual_seed(0)
    twin = toy().eval()
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=[name.replace("\\", "") for name in PLAIN])
    twin = peft.get_peft_model(twin, config)
    mine = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    with torch.no_grad():
        for name, layer in mine.items():
            theirs, ranks = twin.base_model.model.get_submodule(name), layer.sets["generator"]
            theirs.lora_A["default"].weight.copy_(ranks.down)
            theirs.lora_B["default"].weight.copy_(ranks.up.t().reshape(theirs.lora_B["default"].weight.shape))
    return twin, {name: twin.base_model.model.get_submodule(name) for name in mine}


def all_ones(context):
    slots = context.config.num_slots
    shape = (len(context.layer_names), 1)
    chosen = torch.arange(slots).expand(*shape, slots)
    return Routing(torch.ones(*shape, slots), chosen, torch.full((*shape, slots), 1 / slots), torch.ones(*shape, slots))


@pytest.mark.parametrize("kind", ["lora", "mor"])
def test_forward_and_gradients_equal_pefts(kind, make_toy, small_config, toy, images):
    changes = {"num_zero": 0, "top_k": 10} if kind == "mor" else {}
    model, report = make_toy(small_config(kind, targets=PLAIN, scale=2.0, **changes))
    if kind == "mor":
        report.context.routing = all_ones(report.context)
    twin, theirs = peft_twin(toy, model)
    output, expected = model(images), twin(images)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in theirs.items():
        ranks = model.get_submodule(name).sets["generator"]
        torch.testing.assert_close(ranks.down.grad, layer.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
        up = layer.lora_B["default"].weight.grad.flatten(1).t()
        torch.testing.assert_close(ranks.up.grad, up, rtol=1e-3, atol=1e-4)


def test_one_routing_exports_to_peft(make_toy, toy, images, scores, tmp_path):
    model, report = make_toy(targets=PLAIN, scale=0.5)
    report.context.condition = scores
    report.context.routing = routing = report.context.routing.image(1)
    folder = export_lora(tmp_path / "lora", model)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2 + 4
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(toy().eval(), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    zeros = (routing.chosen >= report.context.config.num_experts).sum().item()
    assert zeros > 0
    rows = [value for key, value in lora_state_dict(model).items() if key.endswith("lora_A.weight")]
    assert sum((value.flatten(1) == 0).all(1).sum().item() for value in rows) == zeros
    report.context.condition = scores
    with pytest.raises(InputError, match="one for 3 images"):
        export_lora(tmp_path / "other", model)


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        use_linear_projection=True,
    ).eval()


def test_diffusers_loads_an_exported_routing(scores):
    model, bare = unet(), unet()
    config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=("sd_unet",))
    report = inject(model, config, condition_dim=3)
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            nn.init.normal_(module.sets["generator"].up, std=0.2)
    report.context.condition = scores[:1]
    bare.load_lora_adapter(lora_state_dict(model, prefix="unet."), prefix="unet")
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(latents, 5, text).sample
        assert (expected - unet()(latents, 5, text).sample).abs().max() > 1e-2
        torch.testing.assert_close(bare(latents, 5, text).sample, expected, rtol=1e-4, atol=1e-5)


def test_lora_of_peft_becomes_shared_ranks(make_toy, small_config, toy, images, scores, tmp_path):
    model, _ = make_toy(small_config("lora", targets=PLAIN, scale=2.0))
    twin, _ = peft_twin(toy, model)
    twin.save_pretrained(tmp_path / "lora")
    torch.manual_seed(0)
    plain, grown = toy().eval(), toy().eval()
    grown.load_state_dict(plain.state_dict())
    import_lora(tmp_path / "lora", plain)
    config = MoRConfig(num_ranks=20, num_shared=12, top_k=3, num_zero=2, scale=0.7)
    report = import_lora(tmp_path / "lora", grown, config=config, condition_dim=3)
    report.context.condition = scores
    with torch.no_grad():
        torch.testing.assert_close(plain(images), twin(images), rtol=1e-4, atol=1e-5)
        # Its routed ranks are fresh, so they add nothing yet.
        torch.testing.assert_close(grown(images), twin(images), rtol=1e-4, atol=1e-5)


def lora_of(layer, fan_in=(8,), name=""):
    """A LoRA of two ranks on a layer of eight outputs."""
    return {
        f"{layer}.lora_A{name}.weight": torch.ones(2, *fan_in),
        f"{layer}.lora_B{name}.weight": torch.ones(8, 2, *[1] * (len(fan_in) - 1)),
    }


def two_adapters(*names):
    return lora_of("to_q", name=f".{names[0]}") | lora_of("pooled", name=f".{names[1]}" if names[1:] else "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"to_q.alpha": torch.ones(())}, "is not one of a LoRA"),
        (lambda: {"to_q.lora_A.weight": torch.ones(2, 8)}, "lora_A and lora_B"),
        (lambda: {}, "any layer"),
        (lambda: {"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(8, 2)}, "no layer 'x'"),
        (lambda: {"to_q.lora_A.weight": torch.ones(2, 9), "to_q.lora_B.weight": torch.ones(8, 2)}, "do not fit"),
        (
            lambda: {
                **{"to_q.lora_A.weight": torch.ones(2, 8), "to_q.lora_B.weight": torch.ones(8, 2)},
                **{"pooled.lora_A.weight": torch.ones(3, 8), "pooled.lora_B.weight": torch.ones(8, 3)},
            },
            "different ranks",
        ),
        (lambda: two_adapters("one", "two"), "holds the adapters one and two; give the keys of one"),
        (lambda: two_adapters("one"), r"holds the adapters one and \(unnamed\)"),
        (lambda: lora_of("to_q") | {"base_model.model.to_q.lora_A.weight": torch.ones(2, 8)}, "two tensors lora_A"),
        (lambda: lora_of("reflected", (8, 3, 3)), "reflected is a convolution with groups, dilation or padded borders"),
        (lambda: lora_of("grouped", (2, 3, 3)), "grouped is a convolution with groups, dilation or padded borders"),
    ],
)
def test_bad_loras(change, message, toy):
    model = toy()
    with pytest.raises(WeightsError, match=message):
        import_lora(change(), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_that_the_config_cannot_hold(toy, tmp_path):
    state = {"to_q.lora_A.weight": torch.ones(2, 8), "to_q.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(ConfigError, match="num_shared=8: expected 2"):
        import_lora(state, toy(), config=MoRConfig(), condition_dim=3)
    with pytest.raises(WeightsError, match="no such file"):
        import_lora(tmp_path / "x.safetensors", toy())


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).eval()


def peft_model(rank=4, alpha=16, **settings):
    """A LoRA of peft on the first of three layers, alpha four times its rank."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="^0$", **settings)
    model = peft.get_peft_model(linear(), config).eval()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_read_beside_the_file_too(rslora, tmp_path):
    source, inputs = peft_model(use_rslora=rslora), torch.randn(2, 8)
    source.save_pretrained(tmp_path)
    model = linear()
    report = import_lora(tmp_path / "adapter_model.safetensors", model)
    assert [entry.name for entry in report.matched] == ["0"], "not 1.0, which ends in it"
    torch.testing.assert_close(model(inputs), source(inputs))
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"adapter_config\.json cannot be read"):
        import_lora(tmp_path / "adapter_model.safetensors", linear())


def test_the_scale_is_read_from_a_file_of_diffusers(tmp_path):
    source, model, inputs = unet(), unet(), (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 8))
    with torch.no_grad():
        bare = source(*inputs).sample
        source.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
        source.save_lora_adapter(tmp_path)
        import_lora(tmp_path / "pytorch_lora_weights.safetensors", model)
        expected = source(*inputs).sample
        assert (expected - bare).abs().max() > 1e-3
        torch.testing.assert_close(model(*inputs).sample, expected)


def header_file(path, **settings):
    save_file(lora_of("0"), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return path


def test_headers_of_several_networks(tmp_path):
    """As diffusers' pipelines write them; one scale is wanted for all."""
    both = {"text.r": 2, "text.lora_alpha": 6, "unet.r": 2, "unet.lora_alpha": 6}
    model = linear()
    import_lora(header_file(tmp_path / "a.safetensors", **both), model)
    assert model[0].contexts["generator"].config.scale == 3
    for settings, message in (
        ({**both, "text.lora_alpha": 2}, r"one scale, its header has \[1\.0, 3\.0\]"),
        ({"peft_type": "LORA"}, "its header has none"),
        ({"r": 0, "lora_alpha": 1}, "cannot be read"),
        ({"r": 2}, "cannot be read"),
    ):
        with pytest.raises(WeightsError, match=message):
            import_lora(header_file(tmp_path / "b.safetensors", **settings), linear())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base's weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"alpha_pattern": {"0": 3}}, "alpha_pattern="),
    ],
)
def test_kinds_of_lora_that_ranks_cannot_be(settings, message, tmp_path):
    peft_model(**settings).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        model = linear()
        with pytest.raises(WeightsError, match=message):
            import_lora(source, model)
        assert type(model[0]) is nn.Linear
    with pytest.raises(WeightsError, match=message):
        import_lora(header_file(tmp_path / "x.safetensors", r=2, lora_alpha=2, **settings), linear())


class Twice(nn.Module):
    """One layer under two names, and one inside a part under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.part = nn.Sequential(nn.Linear(8, 8))
        self.again = self.part

    def forward(self, inputs):
        return self.again(torch.relu(self.part(self.second(torch.relu(self.first(inputs))))))


def test_a_layer_under_two_names(fill_set, tmp_path):
    """peft puts its ranks under the first name only; a part under two names is one object for it as for us."""
    model = Twice().eval()
    bare, inputs = copy.deepcopy(model), torch.randn(3, 8)
    inject(model, MoRConfig.of_kind("lora", num_ranks=2, targets=["first"]))
    with pytest.raises(ConfigError, match=r"first: peft has no counterpart for .* registered as first and second"):
        export_lora(tmp_path / "lora", model)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(WeightsError, match="first is a layer that is registered as first and second"):
        import_lora(lora_of("first"), Twice())

    inside = copy.deepcopy(bare)
    inject(inside, MoRConfig.of_kind("lora", num_ranks=2, targets=[r"part\.0"]))
    fill_set(inside)
    loaded = peft.PeftModel.from_pretrained(bare, str(export_lora(tmp_path / "part", inside)))
    torch.testing.assert_close(loaded(inputs), inside(inputs))


@pytest.mark.parametrize("kernel", [1, 3])
def test_dilation_matters_where_a_kernel_has_gaps(kernel, fill_set, tmp_path):
    network = nn.Sequential(nn.Conv2d(8, 8, kernel, dilation=2)).eval()
    model, images = copy.deepcopy(network), torch.rand(1, 8, 9, 9)
    inject(model, MoRConfig.of_kind("lora", num_ranks=2, targets=["0"]))
    fill_set(model)
    if kernel > 1:
        with pytest.raises(ConfigError, match="0: peft has no counterpart for a convolution with groups, dilation"):
            export_lora(tmp_path / "lora", model)
        with pytest.raises(WeightsError, match="0 is a convolution with groups, dilation"):
            import_lora(lora_of("0", (8, 3, 3)), network)
        return
    loaded = peft.PeftModel.from_pretrained(network, str(export_lora(tmp_path / "lora", model)))
    torch.testing.assert_close(loaded(images), model(images))


@pytest.mark.parametrize("layer", ["grouped", "reflected"])
def test_layers_without_counterpart(layer, make_toy, scores):
    model, report = make_toy(targets=[layer])
    report.context.condition = scores[:1]
    with pytest.raises(ConfigError, match=f"{layer}: peft has no counterpart"):
        lora_state_dict(model)
