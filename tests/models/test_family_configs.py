"""The configs of experiments/families: two steps each, on the small twin of their family."""

from pathlib import Path

import pytest
from restorer_twins import photo
from training_twins import build, fit
from twins import FAMILIES, write_twin

from morsr.adapters import MoRConfig
from morsr.data import RealESRGANDataModule
from morsr.models.generator import OneStepConfig
from morsr.training.config_files import read_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "experiments" / "families").glob("mor_*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_steps_on_its_family(config, tmp_path):
    name = config.stem.removeprefix("mor_").replace("_", "-")
    for index in range(2):
        photo(tmp_path / "photos" / f"{index}.png", (64, 72))
    settings = read_config(config)["model"]["init_args"]
    assert settings["adapters"]["targets"] == list(FAMILIES[name].targets)
    losses = {key: {**value, "start": 0} for key, value in settings["losses"].items() if key != "lpips"}
    module = build(
        write_twin(tmp_path / "base", name), adapters=MoRConfig(**settings["adapters"]), loss=losses,
        one_step=OneStepConfig(**settings["one_step"]), checkpointing=settings["checkpointing"], lr=settings["lr"],
    )  # fmt: skip
    data = RealESRGANDataModule(train=[str(tmp_path / "photos")], batch_size=2, crop_size=32, num_workers=0)
    trainer = fit(module, tmp_path, 2, data=data)
    assert trainer.global_step == 2
    assert {"train/vsd", "train/gan", "train/balance"} <= trainer.callback_metrics.keys()
