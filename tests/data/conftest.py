"""Small photographs on disk, and a data module over them that leaves nothing outside the test's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def noise_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth random colours, uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with seven PNG of 72x64 to 96x64 pixels, two of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(7):
        path = folder / ("sub" if number > 4 else "") / f"photo{number}.png"
        Image.fromarray(noise_picture(64, 72 + 4 * number, number)).save(path)
    return folder


@pytest.fixture
def make_data(tmp_path: Path, photos: Path) -> Callable[..., Any]:
    """RealESRGANDataModule with tiny settings, overridden by keywords."""
    from morsr.data.datamodule import RealESRGANDataModule

    def make(**settings: Any) -> RealESRGANDataModule:
        tiny = {
            "train": [str(photos)],
            "test": [],
            "batch_size": 4,
            "crop_size": 32,
            "samples_per_epoch": 16,
            "num_workers": 0,
            "cache_dir": str(tmp_path / "cache"),
            "val_multiple": 16,
        }
        return RealESRGANDataModule(**{**tiny, **settings})

    return make
