"""What validation logs is what `morsr score` says of the saved images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from morsr.adapters import MoRConfig
from morsr.evaluation.score import score_folders
from morsr.models.generator import OneStepConfig
from morsr.training.module import OneStepSRModule


def batch(index: int) -> dict[str, Any]:
    """A pair of 48x64 and 192x256 whose values are those of 8-bit files."""
    generator = torch.Generator().manual_seed(index)
    hr = torch.rand(1, 3, 24, 32, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
    hr = ((hr + 0.1 * torch.randn(hr.shape, generator=generator)).clamp(0, 1) * 255).round() / 255
    lr = (torch.nn.functional.avg_pool2d(hr, 4) * 255).round() / 255
    return {"lr": lr, "hr": hr, "stem": [f"image{index}"]}


class Save(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        for name, images in (("sr", outputs["sr"]), ("hr", batch["hr"])):
            (self.folder / name).mkdir(exist_ok=True)
            pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(self.folder / name / f"{batch['stem'][0]}.png")


def test_logged_means_are_those_of_the_saved_files(small_base: Path, tmp_path: Path) -> None:
    module = OneStepSRModule(
        base=str(small_base), one_step=OneStepConfig(timestep=150, scale_input=True),
        adapters=MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=("sd_unet@unet",)),
    )  # fmt: skip
    module.configure_model()
    module.weights_file = "none is loaded: the module as it is"
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[Save(tmp_path)], enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    loader = DataLoader([batch(index) for index in range(3)], batch_size=None)
    logged = trainer.validate(module, loader, verbose=False)[0]
    report = score_folders({"sr": tmp_path / "sr"}, tmp_path / "hr", progress=False)
    assert {f"val/{info.name}" for info in report.metrics} <= logged.keys()
    for name, tolerance in (("psnr", 1e-4), ("ssim", 1e-6), ("niqe", 1e-3)):
        assert logged[f"val/{name}"] == pytest.approx(report.mean("sr", name), abs=tolerance)
