"""Real pairs in training, validation and tests: cropped together, mixed with others, and damaged ones passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.data.datamodule import RealESRGANDataModule
from morsr.errors import InputError

Make = Callable[..., RealESRGANDataModule]


def batches(data: RealESRGANDataModule, count: int) -> list[dict[str, Any]]:
    """The first finished training batches."""
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [data.finish_batch(next(loader)) for _ in range(count)]


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, str]:
    """Three pairs of folders whose HR images are the LR ones with every pixel repeated."""
    for number in range(3):
        lr = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        for name, image in (("lr", lr), ("hr", lr.repeat(4, 0).repeat(4, 1))):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "pairs" / name / f"{number}.png")
    return {"lr": str(tmp_path / "pairs" / "lr"), "hr": str(tmp_path / "pairs" / "hr")}


def repeated(lr: torch.Tensor) -> torch.Tensor:
    return lr.repeat_interleave(4, -1).repeat_interleave(4, -2)


def test_real_pairs_are_cropped_and_turned_together(make_data: Make, pairs: dict[str, str]) -> None:
    found = batches(make_data(train=[pairs], max_downscale=3.0), 4)
    for batch in found:
        torch.testing.assert_close(batch["hr"], repeated(batch["lr"]), rtol=0, atol=0)
        assert "parameters" not in batch
    assert len({batch["lr"].sum().item() for batch in found}) == 4, "crops differ"


def test_real_pairs_mix_with_degraded_and_synthetic_images(
    make_data: Make, pairs: dict[str, str], photos: Path
) -> None:
    settings = {"train": [pairs, str(photos)], "dead_leaves": 0.25}
    kinds = {"pair": 0, "other": 0}
    for batch in batches(make_data(**settings), 4):
        for stem, hr, lr in zip(batch["stem"], batch["hr"], batch["lr"], strict=True):
            same = torch.equal(hr, repeated(lr))
            assert same == (len(stem) == 1), stem
            kinds["pair" if same else "other"] += 1
    assert min(kinds.values()) > 0
    sharp = batches(make_data(**settings, usm=True), 1)[0]
    for stem, hr, lr in zip(sharp["stem"], sharp["hr"], sharp["lr"], strict=True):
        assert torch.equal(hr, repeated(lr)) == (len(stem) == 1), "real targets are not sharpened"


@pytest.mark.parametrize("cache_mb", [512, 0])
def test_one_hr_image_may_be_in_several_pairs_and_alone(
    make_data: Make, pairs: dict[str, str], tmp_path: Path, cache_mb: int
) -> None:
    other = {**pairs, "lr": str(tmp_path / "other")}
    Path(other["lr"]).mkdir()
    for number in range(3):
        Image.new("RGB", (20, 24), (number, 0, 0)).save(Path(other["lr"]) / f"{number}.png")
    (Path(other["lr"]) / "0.png").write_bytes(b"")  # its HR image stays good in the other sources
    (Path(other["lr"]) / "1.png").write_bytes((Path(other["lr"]) / "1.png").read_bytes()[:-20])
    kinds: dict[str, set[str]] = {}
    data = make_data(train=[pairs, other, pairs["hr"]], recipe="light", cache_mb=cache_mb)
    for batch in batches(data, 4):
        for stem, hr, lr in zip(batch["stem"], batch["hr"], batch["lr"], strict=True):
            black = "other" if lr[1:].max() == 0 else "degraded"
            kinds.setdefault(stem, set()).add("pair" if torch.equal(hr, repeated(lr)) else black)
    everywhere = {"pair", "degraded"}
    assert kinds == {"0": everywhere, "1": everywhere, "2": everywhere | {"other"}}


def test_pairs_that_do_not_fit_are_named(make_data: Make, pairs: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (80, 80)).save(Path(pairs["hr"]) / "1.png")
    with pytest.raises(InputError, match="1 \\(20x24 and 80x80\\)"):
        make_data(train=[pairs]).setup("fit")
    absent = {"lr": str(tmp_path / "no"), "hr": str(tmp_path / "no"), "optional": True}
    with pytest.raises(InputError, match="none of the optional sources"):
        make_data(train=[absent]).setup("fit")


@pytest.mark.parametrize("val_crop", [32, 50, 90])
def test_validation_pairs_are_cropped_in_the_middle(make_data: Make, pairs: dict[str, str], val_crop: int) -> None:
    whole = make_data(val=[pairs], test=[pairs], val_crop=val_crop)
    height, width = min(24, val_crop // 4), min(20, val_crop // 4)
    top, left = (24 - height) // 2, (20 - width) // 2
    for cropped, full in zip(whole.val_dataloader(), whole.test_dataloader(), strict=True):
        assert cropped["stem"] == full["stem"]
        assert full["hr"].shape == (1, 3, 96, 80), "test pairs stay whole"
        middle = full["lr"][..., top : top + height, left : left + width]
        torch.testing.assert_close(cropped["lr"], middle, rtol=0, atol=0)
        torch.testing.assert_close(cropped["hr"], repeated(middle), rtol=0, atol=0)


def test_pairs_of_several_sizes_fit_into_a_batch_with_val_crop(make_data: Make, pairs: dict[str, str]) -> None:
    for folder, scale in (("lr", 1), ("hr", 4)):
        Image.new("RGB", (30 * scale, 18 * scale)).save(Path(pairs[folder]) / "3.png")
    (batch,) = make_data(val=[pairs], val_batch_size=4, val_crop=64).val_dataloader()
    assert batch["lr"].shape == (4, 3, 16, 16)


def cut(path: str | Path) -> None:
    """Keep the first half of a JPEG in place of a PNG: its header is whole and its pixels are not."""
    with Image.open(path) as image:
        image.save(path, format="JPEG")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("use", ["validate", "test"])
def test_damaged_pairs_are_passed_over_before_the_first_pass(make_data: Make, pairs: dict[str, str], use: str) -> None:
    cut(Path(pairs["hr"]) / "1.png")
    (Path(pairs["lr"]) / "2.png").write_bytes(b"")
    data = make_data(val=[pairs], test=[pairs], num_workers=1)
    data.setup(use)
    loader = data.val_dataloader() if use == "validate" else data.test_dataloader()
    assert [batch["stem"] for batch in loader] == [["0"]]
    assert sorted(Path(path).name for path in data.skipped) == ["1.png", "2.png"]
    cut(Path(pairs["hr"]) / "0.png")
    with pytest.raises(InputError, match="pairs: none of 3 pairs can be used; the first: "):
        make_data(val=[pairs], test=[pairs]).setup(use)


def test_damaged_pairs_do_not_end_a_training(make_data: Make, pairs: dict[str, str]) -> None:
    (Path(pairs["hr"]) / "1.png").write_bytes(b"")  # found by its header
    cut(Path(pairs["lr"]) / "2.png")  # found when it is decoded
    data = make_data(train=[pairs])
    assert {stem for batch in batches(data, 4) for stem in batch["stem"]} == {"0"}
    assert sorted(Path(path).name for path in data.skipped) == ["1.png", "2.png"]
    (Path(pairs["lr"]) / "0.png").write_bytes(b"")
    (Path(pairs["lr"]) / "2.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no training image can be used; the first: .*cannot be read"):
        make_data(train=[pairs]).setup("fit")
