"""The script that cuts photographs: what it writes, starting it again, and what it refuses."""

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_files import save, smooth
from jsonargparse import auto_cli

from morsr.imaging import read_rgb

SIZES = ["--size=32", "--step=24"]


@pytest.fixture
def cut(repo_root, monkeypatch):
    """The script's command line in this process; it returns the exit code."""
    monkeypatch.syspath_prepend(str(repo_root / "data_prep"))
    script = importlib.import_module("cut_subimages")
    monkeypatch.setattr(script, "ProcessPoolExecutor", ThreadPoolExecutor)
    return lambda *arguments: auto_cli(script.main, args=[*map(str, arguments)], as_positional=True)


def test_sub_images_cover_the_photograph(cut, photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "photo1.png").write_bytes(b"damaged")
    save(photos / "small.png", smooth(20, 90, 0))
    assert cut(photos, out, *SIZES) == 1
    said = capsys.readouterr().err
    assert "photo1.png" in said
    assert "small.png" in said
    # 96 x 64 pixels: columns at 0, 24, 48 and, because 16 pixels would be lost, 64; rows at 0, 24 and 32
    whole = read_rgb(photos / "sub" / "photo6.png")
    made = {path.name: path for path in (out / "sub").glob("photo6_*.png")}
    assert set(made) == {f"photo6_32_{top:04d}_{left:04d}.png" for top in (0, 24, 32) for left in (0, 24, 48, 64)}
    np.testing.assert_array_equal(read_rgb(made["photo6_32_0032_0064.png"]), whole[32:, 64:])
    kept = made["photo6_32_0000_0000.png"].stat().st_mtime_ns
    made["photo6_32_0032_0064.png"].unlink()
    assert cut(photos, out, *SIZES) == 1
    assert made["photo6_32_0032_0064.png"].is_file()
    assert made["photo6_32_0000_0000.png"].stat().st_mtime_ns == kept


def test_photographs_of_one_name_are_refused(cut, photos, tmp_path, capsys):
    save(photos / "photo1.jpg", smooth(40, 40, 0))
    assert cut(photos, tmp_path / "out", *SIZES) != 0
    assert "photo1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
