"""Small photographs and pairs on disk, and a data module over them."""

from typing import Any

import numpy as np
import pytest
from data_files import save, smooth


@pytest.fixture
def photos(tmp_path):
    """A folder with seven PNG of 72x64 to 96x64 pixels, two of them in a subfolder."""
    for number in range(7):
        folder = tmp_path / "photos" / ("sub" if number > 4 else "")
        save(folder / f"photo{number}.png", smooth(64, 72 + 4 * number, number))
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    """Three pairs of files whose HR images are the LR ones with every pixel repeated."""
    for number in range(3):
        lr = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        save(tmp_path / "real" / "LR" / f"{number}.png", lr)
        save(tmp_path / "real" / "HR" / f"{number}.png", lr.repeat(4, 0).repeat(4, 1))
    return {"lr": str(tmp_path / "real" / "LR"), "hr": str(tmp_path / "real" / "HR")}


@pytest.fixture
def make_data(photos):
    """RealESRGANDataModule with tiny settings, overridden by keywords."""
    from morsr.data import RealESRGANDataModule

    def make(**settings: Any) -> Any:
        tiny = {"train": [str(photos)], "test": [], "recipe": "light", "batch_size": 4, "crop_size": 32,
                "samples_per_epoch": 16, "num_workers": 0, "val_multiple": 16}  # fmt: skip
        return RealESRGANDataModule(**{**tiny, **settings})

    return make
