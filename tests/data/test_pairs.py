"""Pairs for validation and tests: found by stem, or degraded once and kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.data import degraded
from morsr.data.degraded import degraded_images, degraded_pairs, embedded_benchmark, image_key
from morsr.data.pairs import crop_to_multiple, paired_folder, source_name
from morsr.errors import ConfigError, InputError


def save(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def test_folders_are_paired_by_stem(tmp_path: Path):
    for name in ("b", "a"):
        save(tmp_path / "LR" / f"{name}.png", 8, 6)
        save(tmp_path / "HR" / f"{name}.bmp", 32, 24)
    pairs = paired_folder(tmp_path / "LR", tmp_path / "HR")
    assert [(pair.stem, Path(pair.lr).name, Path(pair.hr).name) for pair in pairs] == [
        ("a", "a.png", "a.bmp"),
        ("b", "b.png", "b.bmp"),
    ]
    loaded = pairs[0].load()
    assert (loaded.lr.shape, loaded.hr.shape, loaded.parameters) == ((8, 6, 3), (32, 24, 3), None)


def test_unmatched_files_are_listed(tmp_path: Path):
    for name in ("a", "b", "c"):
        save(tmp_path / "LR" / f"{name}.png", 8, 8)
    for name in ("b", "z"):
        save(tmp_path / "HR" / f"{name}.png", 32, 32)
    with pytest.raises(InputError, match="3 files have no partner") as caught:
        paired_folder(tmp_path / "LR", tmp_path / "HR")
    assert all(name in str(caught.value) for name in ("LR/a.png", "LR/c.png", "HR/z.png"))


def test_a_pair_with_a_damaged_file_is_raised_or_noted(tmp_path: Path):
    for name in ("a", "b"):
        save(tmp_path / "LR" / f"{name}.png", 8, 8)
        save(tmp_path / "HR" / f"{name}.png", 32, 32)
    (tmp_path / "LR" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"LR/a\.png: cannot be read"):
        paired_folder(tmp_path / "LR", tmp_path / "HR")
    skipped: dict[str, str] = {}
    assert [pair.stem for pair in paired_folder(tmp_path / "LR", tmp_path / "HR", skipped=skipped)] == ["b"]
    ((path, reason),) = skipped.items()
    assert Path(path) == tmp_path / "HR" / "a.png"
    assert "LR/a.png" in reason


def test_wrong_sizes_and_double_stems_are_refused(tmp_path: Path):
    save(tmp_path / "LR" / "a.png", 8, 8)
    save(tmp_path / "HR" / "a.png", 32, 31)
    with pytest.raises(InputError, match=r"a \(8x8 and 31x32\)"):
        paired_folder(tmp_path / "LR", tmp_path / "HR")
    save(tmp_path / "LR" / "a.bmp", 8, 8)
    with pytest.raises(InputError, match="two images have the stem a"):
        paired_folder(tmp_path / "LR", tmp_path / "HR")


def test_crop_is_central_and_a_multiple():
    image = np.arange(30 * 50 * 3).reshape(30, 50, 3)
    np.testing.assert_array_equal(crop_to_multiple(image, 16), image[7:23, 1:49])
    assert crop_to_multiple(image, 8, largest=17).shape == (16, 16, 3)
    with pytest.raises(InputError, match="at least 64 pixels"):
        crop_to_multiple(image, 64)


def test_lr_images_are_made_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"multiple": 16, "cache_dir": tmp_path / "cache"}
    made = degraded_pairs([str(photos)], (0, 3), "light", **settings)
    assert len(made) == 14
    assert made[1].stem == "photo0_s3"
    assert (made[1].image, made[1].seed, made[1].key) == ("photo0", 3, image_key("photo0", 3))
    assert made[0].hr.shape == (64, 64, 3)
    assert made[0].lr.shape == (16, 16, 3)
    assert not np.array_equal(made[0].lr, made[1].lr)

    monkeypatch.setattr(degraded, "_make", lambda *_: pytest.fail("made again"))
    again = degraded_pairs([str(photos)], (0, 3), "light", **settings)
    for one, two in zip(made, again, strict=True):
        np.testing.assert_array_equal(one.lr, two.lr)


def test_images_that_share_a_stem_are_called_by_their_paths(tmp_path: Path):
    for number, name in enumerate(("x/1.png", "y/1.png", "y/2.png", "z/3.png", "z/3.bmp", "4.png", "y/4.png")):
        save(tmp_path / "in" / name, 32 + 4 * number, 32)
    settings = {"recipe": "light", "multiple": 4, "cache_dir": tmp_path / "cache"}
    found = degraded_images([str(tmp_path / "in")], (0, 2), **settings)
    names = {Path(row.hr).relative_to(tmp_path / "in").as_posix(): row.image for row in found}
    assert names == {
        "x/1.png": "x/1", "y/1.png": "y/1", "y/2.png": "2", "z/3.png": "z/3_png", "z/3.bmp": "z/3_bmp", "4.png": "4",
        "y/4.png": "y/4",
    }  # fmt: skip
    assert all(row.key == image_key(row.image, row.seed) and row.stem == f"{row.image}_s{row.seed}" for row in found)
    assert len({row.key for row in found}) == len({row.lr for row in found}) == 14
    heights = {row.image: row.load().hr.shape[0] for row in found}
    assert (heights["x/1"], heights["y/1"], heights["z/3_bmp"]) == (32, 36, 48)

    (tmp_path / "list.txt").write_text("x/1.png\ny/1.png\ny/2.png\ny/2.png\n")
    listed = degraded_images([{"source": str(tmp_path / "list.txt"), "root": str(tmp_path / "in")}], **settings)
    assert [row.stem for row in listed] == ["x/1", "y/1", "2"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("sets/photos_v1.5", "photos_v1.5"),
        ("sets/photos/", "photos"),
        ("sets/photos_v1.5.csv", "photos_v1.5"),
        ("list.txt", "list"),
        ({"source": "DIV2K/HR", "name": "DIV2K"}, "DIV2K"),
        ({"lr": "RealSR.v3/LR", "hr": "RealSR.v3/HR"}, "RealSR.v3"),
        ({"lr": "RealSR/LR", "hr": "RealSR/HR", "name": "real"}, "real"),
        ("skimage:eval", "embedded"),
    ],
)
def test_names_of_sources(source, name: str):
    assert source_name(source) == name


def test_folders_that_are_named_from_within_take_the_name_of_the_folder_around_them(tmp_path: Path):
    assert source_name({"lr": "LR", "hr": "HR"}) == source_name(".") == tmp_path.name


def test_stored_pairs_repeat_the_degradation_exactly(photos: Path, tmp_path: Path):
    from morsr.degradation import DegradationRecipe, apply

    (pair, *_) = degraded_pairs([str(photos)], recipe="realesrgan", multiple=16, cache_dir=tmp_path)
    drawn = DegradationRecipe.from_preset("realesrgan").sample(torch.tensor([pair.key]))
    hr = torch.from_numpy(pair.hr).permute(2, 0, 1)[None] / 255
    for parameters in (drawn, pair.parameters):
        lr = apply(hr, parameters)[0].mul(255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(lr, pair.lr)
    (row,) = [json.loads(path.read_text()) for path in tmp_path.rglob("photo0-*.json")]
    assert (row["image"], row["seed"], row["recipe"]) == ("photo0", 0, "realesrgan")


def test_changed_or_damaged_entries_are_made_anew(photos: Path, tmp_path: Path):
    settings = {"multiple": 16, "cache_dir": tmp_path / "cache"}
    before = degraded_images([str(photos)], recipe="light", **settings)
    Path(before[0].lr).write_bytes(b"cut")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(before[1].hr)
    after = degraded_images([str(photos)], recipe="light", **settings)
    assert after[0].load().lr.shape == (16, 16, 3)
    assert after[1].lr != before[1].lr
    assert after[2:] == before[2:]
    other = degraded_images([str(photos)], recipe="realesrgan", **settings)
    assert Path(other[2].lr).parent != Path(before[2].lr).parent


def test_bad_images_are_named_or_raised(photos: Path, tmp_path: Path):
    (photos / "photo0.png").write_bytes(b"no image")
    save(photos / "tiny.png", 8, 8)
    with pytest.raises(InputError, match="photo0"):
        degraded_images([str(photos)], multiple=16, cache_dir=tmp_path)
    skipped: dict[str, str] = {}
    found = degraded_images([str(photos)], recipe="light", multiple=16, cache_dir=tmp_path, skipped=skipped)
    assert len(found) == 6
    assert sorted(Path(path).name for path in skipped) == ["photo0.png", "tiny.png"]
    with pytest.raises(InputError, match="can be used"):
        degraded_images([str(photos)], multiple=512, cache_dir=tmp_path, skipped={})


def test_unknown_recipes_and_engines_and_a_blocked_cache(photos: Path, tmp_path: Path):
    with pytest.raises(ConfigError):
        degraded_images([str(photos)], recipe="unheard", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="engine"):
        degraded_images([str(photos)], engine="gpu", cache_dir=tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        degraded_images([str(photos)], recipe="light", multiple=16, cache_dir=tmp_path / "file")


def test_embedded_benchmark(tmp_path: Path):
    pairs = embedded_benchmark(seeds=[1], recipe="light", multiple=256, cache_dir=tmp_path)
    assert [pair.stem for pair in pairs] == ["astronaut", "chelsea", "coffee", "rocket"]
    assert [pair.hr.shape for pair in pairs] == [(512, 512, 3), (256, 256, 3), (256, 512, 3), (256, 512, 3)]
    assert all(
        4 * side == whole for pair in pairs for side, whole in zip(pair.lr.shape[:2], pair.hr.shape[:2], strict=True)
    )
    assert len(pairs[0].parameters) == 1
