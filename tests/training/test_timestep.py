"""`timestep: auto`: the timestep whose signal-to-noise ratio is that of the encoded LR images."""

import pytest
import torch
from training_twins import Pairs, build, fit

from morsr.adapters import read_adapters_header
from morsr.errors import ConfigError
from morsr.functional.diffusion import matching_timestep, pair_moments, scaled_linear_alphas_cumprod
from morsr.models.generator import OneStepConfig
from morsr.models.loading import load_generator

_ALPHA = scaled_linear_alphas_cumprod()
_SIGMA = 3 * torch.linspace(0.001, 1, 1000) / (1 + 2 * torch.linspace(0.001, 1, 1000))
KINDS = {"epsilon": (_ALPHA.sqrt(), (1 - _ALPHA).sqrt()), "flow": (1 - _SIGMA, _SIGMA)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [10, 273, 700])
def test_noised_latents_give_their_timestep_back(kind, timestep):
    signal, noise = KINDS[kind]
    clean = 0.7 * torch.randn(8, 16, 64, 64) + 0.3
    degraded = signal[timestep] * clean + noise[timestep] * torch.randn_like(clean)
    moments = sum(pair_moments(d, c) for d, c in zip(degraded.split(3), clean.split(3), strict=True))
    assert abs(matching_timestep(moments, signal, noise) - timestep) <= 2


class Smooth(Pairs):
    """LR images that tell more of the HR ones than the random pairs do."""

    def pair(self, index: int) -> dict[str, torch.Tensor]:
        found = super().pair(index)
        return {
            **found,
            "hr": torch.nn.functional.interpolate(found["lr"][None], (32, 32), mode="bicubic")[0].clamp(0, 1),
        }


def test_it_is_found_once_before_the_first_step_and_goes_into_every_file(small_base, tmp_path):
    auto = OneStepConfig(timestep="auto")
    module = build(small_base, one_step=auto)
    with pytest.raises(ConfigError, match="auto"):
        module.generator(torch.rand(1, 3, 8, 8))
    fit(module, tmp_path, 1, save_at=1)
    found = module.generator.one_step.timestep
    assert found in range(1, 1000)
    module.save_adapters(tmp_path / "adapters.safetensors")
    assert read_adapters_header(tmp_path / "adapters.safetensors")["extra"]["one_step"]["timestep"] == found
    assert load_generator(tmp_path / "adapters.safetensors").one_step.timestep == found

    resumed = build(small_base, one_step=auto)
    fit(resumed, tmp_path, 2, ckpt=tmp_path / "at-step=1.ckpt", data=Smooth())
    assert resumed.generator.one_step.timestep == found
    given = build(small_base, one_step=auto, weights=str(tmp_path / "adapters.safetensors"))
    assert given.generator.one_step.timestep == found
    fresh = build(small_base, one_step=auto)
    fit(fresh, tmp_path, 1, data=Smooth())
    assert fresh.generator.one_step.timestep == 0
