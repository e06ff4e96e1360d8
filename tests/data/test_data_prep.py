"""The script that cuts photographs: what it writes, starting it again, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import save, smooth

from morsr.data.images import read_rgb

SIZES = ["--size=32", "--step=24", "--slack=4"]


@pytest.fixture
def cut(repo_root: Path):
    def run(*arguments: object, code: int = 0) -> str:
        command = [sys.executable, repo_root / "data_prep" / "cut_subimages.py", *arguments, "--workers=1"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stderr

    return run


def test_sub_images_cover_the_photograph(cut, photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    (photos / "photo1.png").write_bytes(b"damaged")
    save(photos / "small.png", smooth(20, 90, 0))
    said = cut(photos, out, *SIZES, code=1)
    assert "photo1.png" in said
    assert "small.png" in said
    # 96 x 64 pixels: columns at 0, 24, 48 and, because 16 pixels would be lost, 64; rows at 0, 24 and 32
    whole = read_rgb(photos / "sub" / "photo6.png")
    made = {path.name: path for path in (out / "sub").glob("photo6_*.png")}
    assert set(made) == {f"photo6_32_{top:04d}_{left:04d}.png" for top in (0, 24, 32) for left in (0, 24, 48, 64)}
    np.testing.assert_array_equal(read_rgb(made["photo6_32_0032_0064.png"]), whole[32:, 64:])
    kept = made["photo6_32_0000_0000.png"].stat().st_mtime_ns
    made["photo6_32_0032_0064.png"].unlink()
    cut(photos, out, *SIZES, code=1)
    assert made["photo6_32_0032_0064.png"].is_file()
    assert made["photo6_32_0000_0000.png"].stat().st_mtime_ns == kept


def test_what_cannot_be_cut_is_refused_before_anything_is_written(cut, photos: Path, tmp_path: Path):
    before = sorted(photos.rglob("*"))
    cut(photos, photos / "out", code=2)
    cut(photos, tmp_path / "out", "--step=9999", code=2)
    cut(tmp_path / "absent", tmp_path / "out", code=2)
    assert sorted(photos.rglob("*")) == before
    save(photos / "photo0.bmp", smooth(64, 64, 0))
    cut(photos, tmp_path / "out", *SIZES, code=2)
    assert not (tmp_path / "out").exists()
