"""The configs of experiments/families: two steps each, on the small twin of their family."""

from pathlib import Path

import lightning as L
import pytest
from restorer_twins import photo
from twins import FAMILIES, write_twin

from morsr.adapters import MoRConfig, read_adapters_header
from morsr.data import RealESRGANDataModule
from morsr.models.generator import OneStepConfig
from morsr.models.losses import Distillation, Gan, Losses, Weight
from morsr.training.config_files import read_config
from morsr.training.module import OneStepSRModule

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "experiments" / "families").glob("mor_*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_steps_on_its_family(config, tmp_path):
    name = config.stem.removeprefix("mor_").replace("_", "-")
    for index in range(2):
        photo(tmp_path / "photos" / f"{index}.png", (64, 72))
    settings = read_config(config)["model"]["init_args"]
    assert settings["adapters"]["targets"] == list(FAMILIES[name].targets)
    kinds = {"vsd": Distillation, "gan": Gan}
    losses = {
        key: value and kinds.get(key, Weight)(**{**value, "start": 0}) for key, value in settings["losses"].items()
    }
    module = OneStepSRModule(
        base=str(write_twin(tmp_path / "base", name)), adapters=MoRConfig(**settings["adapters"]),
        one_step=OneStepConfig(**settings["one_step"]), losses=Losses(**{**losses, "lpips": None}),
        checkpointing=settings["checkpointing"], lr=settings["lr"], calibration_images=4,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    data = RealESRGANDataModule(train=[str(tmp_path / "photos")], batch_size=2, crop_size=32, num_workers=0)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert {"train/vsd", "train/gan", "train/balance"} <= trainer.callback_metrics.keys()
    module.save_adapters(tmp_path / "adapters.safetensors")
    timestep = read_adapters_header(tmp_path / "adapters.safetensors")["extra"]["one_step"]["timestep"]
    assert timestep == module.generator.one_step.timestep
    assert timestep in range(1000)
