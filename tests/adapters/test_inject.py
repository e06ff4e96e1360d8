from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from morsr.adapters import (
    AdaptedLayer,
    MoRConfig,
    active_adapters,
    adapter_names,
    adapter_parameters,
    inject,
    preset_targets,
)
from morsr.errors import ConfigError, InputError


def unchanged(model):
    return not any(isinstance(module, AdaptedLayer) for module in model.modules()) and all(
        parameter.requires_grad for parameter in model.parameters()
    )


def sd21_unet():
    from diffusers import UNet2DConditionModel

    # The published config of stabilityai/stable-diffusion-2-1-base, unet/config.json.
    return UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=[5, 10, 20, 20],
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def sd_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    )


def test_sd21_layers_are_those_of_the_field():
    with torch.device("meta"):
        model = nn.ModuleDict({"unet": sd21_unet(), "vae": sd_vae()})
    report = inject(model, MoRConfig(targets=("sd_unet@unet", "sd_vae_encoder@vae")), condition_dim=7)
    unet = [entry for entry in report.matched if entry.name.startswith("unet.")]
    encoder = [entry for entry in report.matched if entry.name.startswith("vae.")]
    kinds = [entry.kind for entry in unet]
    assert (kinds.count("Linear"), kinds.count("Conv2d 3×3"), kinds.count("Conv2d 1×1")) == (192, 52, 14)
    assert len(unet) == 258
    assert len(encoder) == 31 + 1
    assert sum(entry.name == "vae.quant_conv" for entry in encoder) == 1
    per_rank = [sum(entry.parameters for entry in group) / 40 / 1e6 for group in (unet, encoder)]
    assert per_rank == pytest.approx([1.0139, 0.0923], abs=5e-5)
    assert not any("time_emb" in entry.name or "decoder" in entry.name for entry in report.matched)
    assert len(report.matched) + len(report.skipped) == sum(
        isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules()
    )


def test_roles_fit_the_same_unet():
    with torch.device("meta"):
        model = sd21_unet()
    report = inject(model, MoRConfig(targets=("all_unet_like",)), condition_dim=2)
    assert len(report.matched) == 258


def test_tiny_networks():
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    report = inject(nn.ModuleDict({"vae": vae}), MoRConfig(targets=["tiny_vae_encoder@vae"]), condition_dim=2)
    assert all(entry.name.startswith("vae.encoder.layers.") for entry in report.matched)
    assert len(report.matched) == sum(isinstance(m, nn.Conv2d) for m in vae.encoder.modules())
    with torch.no_grad():
        report.context.condition = torch.zeros(1, 2)
        assert vae.encode(torch.zeros(1, 3, 16, 16)).latents.isfinite().all()


def test_wrapped_layer_answers_for_its_base(make_toy):
    model, _ = make_toy()
    layer = model.downsample
    assert isinstance(layer, AdaptedLayer)
    assert (layer.in_channels, layer.stride, layer.padding, layer.weight.dtype) == (8, (2, 2), (0, 0), torch.float32)
    assert layer.weight is layer.base_layer.weight
    assert model.to_q.bias is None
    assert model.to_q.out_features == 8
    assert not hasattr(layer, "no_such_attribute")


def test_targets_match_whole_names_or_dotted_ends(toy):
    model = nn.ModuleDict({"a": toy(), "b": toy()})
    report = inject(model, MoRConfig(targets=["to_q", r"a\.head\..*", "b.shortcut"]), condition_dim=1)
    assert [entry.name for entry in report.matched] == ["a.to_q", "a.head.0", "b.shortcut", "b.to_q"]
    with pytest.raises(ConfigError, match="'o_q' matches none"):
        inject(toy(), MoRConfig(targets=["o_q"]), condition_dim=1)


def test_layer_that_is_registered_twice_is_one_layer(images):
    model = nn.Module()
    model.first = nn.Conv2d(3, 3, 1)
    model.second = model.first
    report = inject(model, MoRConfig(targets=["second"]), condition_dim=1)
    assert [entry.name for entry in report.matched] == ["first"]
    assert model.first is model.second
    assert len(list(model.state_dict())) > len({id(parameter) for parameter in model.parameters()})


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"targets": ["conv_in", "nothing"]}, {}, "'nothing' matches none"),
        ({"targets": ["norm"]}, {}, "'norm' matches none"),
        ({"targets": ["("]}, {}, "not a regular expression"),
        ({"targets": ["sd_net@unet"]}, {}, "unknown target preset 'sd_net'"),
        ({"targets": ["sd_unet@unet"]}, {}, "matches none"),
        ({}, {"condition_dim": None}, "condition_dim"),
        ({}, {"condition_dim": 0}, "condition_dim"),
        ({}, {"name": "a.b"}, "'a.b'"),
        ({}, {"condition_names": ("blur",)}, "condition_names: expected 3 names"),
    ],
)
def test_bad_injections_change_nothing(settings, arguments, message, toy):
    model = toy()
    with pytest.raises(ConfigError, match=message):
        inject(model, MoRConfig(**{"targets": ["conv_in"], **settings}), **{"condition_dim": 3, **arguments})
    assert unchanged(model)


def test_layers_that_cannot_take_an_update(toy):
    with pytest.raises(ConfigError, match="bare Linear"):
        inject(nn.Linear(2, 2), MoRConfig(targets=[".*"]), condition_dim=1)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ConfigError, match=r"attention\.out_proj.*never calls it"):
        inject(attention, MoRConfig(targets=[".*"]), condition_dim=1)
    assert unchanged(attention)


def test_name_in_use(make_toy):
    model, _ = make_toy()
    with pytest.raises(ConfigError, match="'generator' already"):
        inject(model, MoRConfig(targets=["conv_in"]), condition_dim=3)
    assert adapter_names(model) == ("generator",)


def test_bad_conditions(make_toy, images, scores):
    model, report = make_toy()
    context = report.context
    with pytest.raises(InputError, match=r"set context\.condition"):
        model(images)
    with pytest.raises(InputError, match=r"\(B, 3\), got \(3, 2\)"):
        context.condition = scores[:, :2]
    with pytest.raises(InputError, match=r"images \[1\] hold NaN"):
        context.condition = torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]])
    assert context.routing is None
    context.condition = scores[:2]
    with pytest.raises(InputError, match="for 2 images"):
        model(images)
    with pytest.raises(InputError, match="routing: expected fields"):
        context.routing = context.routing._replace(gates=context.routing.gates[:2])
    context.condition = None
    assert context.routing is None


def test_plain_lora_takes_no_condition(make_toy, small_config, scores):
    _, report = make_toy(small_config("lora"))
    with pytest.raises(ConfigError, match="plain LoRA"):
        report.context.condition = scores
    with pytest.raises(ConfigError, match="plain LoRA"):
        report.context.budget = 2
    with pytest.raises(ConfigError, match="plain LoRA"):
        report.context.generative = 0.5


def test_report_is_a_table(make_toy):
    _, report = make_toy()
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "ranks", "parameters"]
    assert "conv_in" in lines[2]
    assert lines[2].split()[-3:] == ["8×3×3×3", "12", f"{12 * (27 + 8)}"]
    assert lines[-1].endswith(f"{report.parameters:,}")
    assert report.parameters == sum(p.numel() for p in report.context.parameters()) + sum(
        entry.parameters for entry in report.matched
    )


def test_context_is_registered_once_and_travels(make_toy, images, scores):
    model, report = make_toy()
    keys = [key for key in model.state_dict() if key.endswith("contexts.generator.weight")]
    assert keys == ["conv_in.contexts.generator.weight"]
    assert {id(p) for p in report.context.parameters()} <= {id(p) for p in adapter_parameters(model)}
    report.context.condition = scores
    with torch.no_grad():
        expected = model(images)
    twin = copy.deepcopy(model)
    assert twin.conv_in.shared is twin.to_q.shared is not model.to_q.shared
    context = twin.conv_in.contexts["generator"]
    with pytest.raises(InputError, match=r"set context\.condition"):
        twin(images)
    context.condition = scores
    with torch.no_grad():
        torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
        low = copy.deepcopy(model).to(torch.bfloat16)
        low.conv_in.contexts["generator"].condition = scores
        assert low.conv_in.contexts["generator"].weight.dtype == torch.float32
        assert low(images.bfloat16()).dtype == torch.bfloat16


def test_preset_names_are_checked():
    assert preset_targets("sd_unet", "net.unet")[1] == r"net\.unet\.(?:conv_in)"
    with pytest.raises(ConfigError, match="unknown target preset"):
        preset_targets("flux")


def test_active_set_of_an_unadapted_model(toy, images):
    model = toy()
    with active_adapters(model, None):
        model(images)
    with pytest.raises(ConfigError, match="no adapter set 'score'"), active_adapters(model, "score"):
        pass
