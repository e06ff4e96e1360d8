import json
from pathlib import Path

import torch

from morsr.models.bases import SHIPPED_BASES, load_base, package_weights
from morsr.models.loading import load_generator
from morsr.models.saving import is_portable


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
