"""What validation logs is what `morsr score` says of the saved images."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from training_twins import build, fit

from morsr.evaluation.score import score_folders


def batch(index: int) -> dict[str, Any]:
    """A pair of 48x64 and 192x256 whose values are those of 8-bit files."""
    generator = torch.Generator().manual_seed(index)
    hr = torch.rand(1, 3, 24, 32, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
    hr = ((hr + 0.1 * torch.randn(hr.shape, generator=generator)).clamp(0, 1) * 255).round() / 255
    return {"lr": (F.avg_pool2d(hr, 4) * 255).round() / 255, "hr": hr, "stem": [f"image{index}"]}


class Save(L.Callback):
    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        for name, images in (("sr", outputs["sr"]), ("hr", batch["hr"])):
            Path(name).mkdir(exist_ok=True)
            save_image(images[0], f"{name}/{batch['stem'][0]}.png")


def test_values_stand_at_the_generators_step(small_base, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(build(small_base), tmp_path, 2, logger=logger, val_check_interval=2, limit_val_batches=1, log_every_n_steps=1)
    rows = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    assert [row["step"] for row in rows if row["val/psnr"]] == ["2"]


def test_logged_means_are_those_of_the_saved_files(small_base):
    module = build(small_base)
    module.weights_file = "none is loaded: the module as it is"
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[Save()], enable_progress_bar=False)
    loader = DataLoader([batch(index) for index in range(2)], batch_size=None)
    logged = trainer.validate(module, loader, verbose=False)[0]
    report = score_folders({"sr": Path("sr")}, Path("hr"))
    assert {f"val/{info.name}" for info in report.metrics} <= logged.keys()
    for name, tolerance in (("psnr", 1e-6), ("ssim", 1e-8), ("niqe", 1e-3)):
        assert logged[f"val/{name}"] == pytest.approx(report.mean("sr", name), abs=tolerance)
