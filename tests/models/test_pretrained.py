import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import cached
from safetensors.torch import load_file, save_file

from morsr.adapters import MoRConfig, read_adapters_header, save_adapters
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.functional.diffusion import epsilon_from_velocity, scaled_linear_alphas_cumprod
from morsr.models.bases import load_base
from morsr.models.bases.reading import NEGATIVE_PROMPT, POSITIVE_PROMPT
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_stable_diffusion_folder_is_read_whole(sd_original):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    base = load_base(sd_original)
    assert base.base_id == "stable-diffusion-2-1-base"
    assert (base.latent_factor, base.scaling_factor) == (2, 0.18215)
    assert base.prediction_type == "epsilon"
    torch.testing.assert_close(base.alphas_cumprod, scaled_linear_alphas_cumprod())
    for network, kind, part in ((base.unet, UNet2DConditionModel, "unet"), (base.vae, AutoencoderKL, "vae")):
        theirs, ours = kind.from_pretrained(sd_original / part).state_dict(), network.state_dict()
        torch.testing.assert_close({name: ours[name] for name in theirs}, theirs, atol=0, rtol=0)


def test_prompts_are_the_text_encoders_as_diffusers_calls_it(sd_original):
    from transformers import CLIPTextModel, CLIPTokenizer

    base = load_base(sd_original)
    tokenizer = CLIPTokenizer.from_pretrained(sd_original / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd_original / "text_encoder")
    for found, text in ((base.prompt_clean, POSITIVE_PROMPT), (base.prompt_degraded, NEGATIVE_PROMPT)):
        tokens = tokenizer(text, padding="max_length", max_length=7, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(found, encoder(tokens)[0])


def test_a_text_replaces_its_fixed_one_and_is_padded_with_the_token_that_stable_diffusion_2_uses(sd_original):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(sd_original / "text_encoder")
    ids = json.loads((sd_original / "tokenizer" / "vocab.json").read_text())
    tokens = [ids["<|startoftext|>"], ids["a</w>"], ids["<|endoftext|>"], *[ids["!"]] * 4]
    with torch.no_grad():
        expected = encoder(torch.tensor([tokens]))[0]
    fixed, own = load_base(sd_original), load_base(sd_original, prompts={"clean": "a"})
    torch.testing.assert_close(own.prompt_clean, expected)
    torch.testing.assert_close(own.prompt_degraded, fixed.prompt_degraded)
    with pytest.raises(ConfigError, match="cleen"):
        load_base(sd_original, prompts={"cleen": "a photo"})


@pytest.mark.parametrize("cached", [True, False])
def test_adapters_bring_the_prompts_they_were_trained_with(sd_folder, tmp_path, cached):
    base = load_base(sd_folder, prompts={"clean": "a"})
    config = MoRConfig(num_ranks=4, num_shared=1, top_k=1, num_zero=1, targets=("sd_unet@unet",))
    OneStepGenerator(base, build_estimator("frequency"), adapters=config)
    recipe = {"estimator": {"kind": "frequency", "args": {}}, "one_step": OneStepConfig().to_dict(),
              "base": str(sd_folder)}  # fmt: skip
    file = tmp_path / "adapters.safetensors"
    save_adapters(file, base, base_id=base.base_id, extra=recipe, attached=base.prompts if cached else None)
    own = load_generator(file, prompt="photo").base.prompt_clean
    torch.testing.assert_close(own, load_base(sd_folder, prompts={"clean": "photo"}).prompt_clean)
    shutil.rmtree(sd_folder / "text_encoder")
    if not cached:
        assert read_adapters_header(file)["attached"] == {}
        with pytest.raises(WeightsError, match="text_encoder"):
            load_generator(file)
        return
    torch.testing.assert_close(load_generator(file).base.prompts, base.prompts, atol=0, rtol=0)


def test_a_v_prediction_model_gives_noise(sd_folder):
    latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        velocity = load_base(sd_folder).predict(latents, steps)
        edit(
            sd_folder / "scheduler" / "scheduler_config.json",
            prediction_type="v_prediction",
            _class_name="DDIMScheduler",
        )
        noise = load_base(sd_folder).predict(latents, steps)
    torch.testing.assert_close(noise, epsilon_from_velocity(latents, velocity, scaled_linear_alphas_cumprod()[steps]))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'epsilon' or 'v_prediction'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None},
         "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "1000"),
        ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "UNet2DConditionModel"),
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, "AutoencoderKL"),
    ],
)  # fmt: skip
def test_models_of_another_kind_are_refused(sd_folder, file, values, words):
    edit(sd_folder / file, **values)
    with pytest.raises(ConfigError) as error:
        load_base(sd_folder)
    assert words in str(error.value)


def test_weights_of_another_network_are_refused(sd_folder):
    path = sd_folder / "unet" / WEIGHTS
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({**{k: v for k, v in tensors.items() if k != first}, "spare": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        load_base(sd_folder)
    assert f"1 missing, such as {first}" in str(error.value)
    assert "1 unexpected, such as spare" in str(error.value)


def test_a_single_file_and_broken_json_are_refused(sd_folder):
    with pytest.raises(WeightsError, match="is a single file; expected a local diffusers folder"):
        load_base(sd_folder / "unet" / WEIGHTS)
    (sd_folder / "vae" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="JSON"):
        load_base(sd_folder)


def test_the_presets_try_their_mirrors():
    for preset, ids in (("sd21", ("sd2-community/", "Manojb/")), ("sd-turbo", ("stabilityai/sd-turbo",))):
        with pytest.raises(WeightsError) as error:
            load_base(preset)
        assert all(one in str(error.value) for one in ids)


def test_a_model_in_the_hubs_cache_is_used_offline(sd_original, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached(tmp_path / "hub", "someone/copy", sd_original)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load_base(["no/such-model", "someone/copy"])
    assert base.base_id == "someone/copy"
    assert base.prompt_clean.shape == (1, 7, 32)
