"""What a run of the shipped config leaves in its folder."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from morsr.cli import main
from morsr.evaluation import RoutingTable

CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "tiny/mor.yaml"


@pytest.mark.slow
def test_one_folder_holds_curves_table_pictures_and_routing(small_base: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (192, 208, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    code = main([
        "fit", "--config", str(CONFIG), "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", f"--trainer.logger.init_args.save_dir={tmp_path}",
        f"--data.train=[{photos}]", f"--data.val=[{photos}]", "--data.batch_size=2", "--data.crop_size=32",
        "--data.num_workers=0", f"--model.base={small_base}",
        "--model.calibration_images=4", "--model.adapters.targets=[sd_unet@unet]",
    ])  # fmt: skip
    assert code == 0
    (run,) = (tmp_path / "mor_tiny").iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "expert_load.png",
            "versions.json", "before_after.png",
            "summary.json", "adapters.safetensors", "routing"} <= names  # fmt: skip
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name for row in rows for name, value in row.items() if value}
    assert {"train/loss", "val/psnr", "val/ssim", "val/niqe", "routing/gate_mass", "watch/grad_norm_generator",
            "routing/task_gradient_share", "watch/lr_generator/ranks", "watch/degradation_blur"} <= logged  # fmt: skip
    events = EventAccumulator(str(run))
    events.Reload()
    assert logged - {"epoch", "step"} <= set(events.Tags()["scalars"])
    assert all(float(row["train/psnr"]) > 0 for row in rows if row["train/psnr"]), "PSNR is shown as PSNR"
    table = RoutingTable.load(run / "routing" / "step_000002.safetensors")
    assert len(table) == 2
