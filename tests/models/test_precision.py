"""What stays in float32 under bfloat16: the UNet's last norm and convolution, x0, estimator and router."""

import pytest
import torch
from torch import nn

from morsr.adapters import MoRConfig, active_adapters, merged
from morsr.adapters.layer import AdaptedLayer
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator


@pytest.fixture
def generator():
    torch.manual_seed(0)
    config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=("sd_unet@unet",))
    return OneStepGenerator(load_base("random:small"), build_estimator("frequency"), adapters=config).eval()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_from_the_last_norm_on_nothing_is_rounded():
    torch.manual_seed(0)
    base = load_base("random:small").requires_grad_(False).eval()
    seen: list[torch.Tensor] = []
    hook = base.unet.conv_norm_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), autocast():
        noise = base.predict(torch.randn(1, 4, 8, 8), 999)
    hook.remove()
    unet = base.unet
    assert seen[0].dtype == torch.bfloat16
    with torch.no_grad():
        expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(seen[0].float())))
    torch.testing.assert_close(noise, expected, atol=0, rtol=0)


def test_the_update_of_a_float32_layer_is_computed_in_float32(generator):
    layer = generator.base.unet.conv_out
    assert isinstance(layer, AdaptedLayer)
    nn.init.normal_(layer.sets["generator"].get_parameter("lora_B"))
    generator.route(torch.rand(2, 3, 16, 16))
    features = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        exact = layer(features)
        with active_adapters(generator.base, None):
            assert not torch.equal(layer(features), exact)
        with autocast():
            torch.testing.assert_close(layer(features), exact, atol=0, rtol=0)
        assert generator.base.unet.conv_in(torch.randn(2, 4, 8, 8)).dtype == torch.float32
        generator.route(torch.rand(1, 3, 16, 16))
        gathered = layer(features[:1])
        with merged(generator.base), autocast():
            torch.testing.assert_close(layer(features[:1]), gathered, atol=1e-5, rtol=1e-5)


def test_scores_gates_and_clean_latents_are_float32_under_autocast(generator):
    lr = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        scores = generator.route(lr).scores
        gates = generator.adapters.routing.gates
        with autocast():
            output = generator(lr)
    torch.testing.assert_close(output.scores.scores, scores, atol=0, rtol=0)
    torch.testing.assert_close(output.routing.gates, gates, atol=0, rtol=0)
    assert output.z0.dtype == output.sr.dtype == torch.float32
