"""The scripts that prepare data: what they write, going on after a stop, and what they say about bad files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morsr.data.images import load_image
from morsr.data.manifests import file_hash, read_manifest, read_rows


@pytest.fixture
def script(repo_root: Path):
    def run(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, repo_root / "data_prep" / f"{name}.py", *arguments, "--workers", "1"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done

    return run


def test_sub_images_cover_the_photograph(script, photos: Path, tmp_path: Path):
    out = tmp_path / "sub"
    (photos / "photo1.png").write_bytes(b"damaged")
    Image.fromarray(np.zeros((20, 90, 3), np.uint8)).save(photos / "small.png")
    done = script("cut_subimages", photos, out, "--size", 32, "--step", 24, "--slack", 4, code=1)
    assert "photo1.png: cannot be read" in done.stderr
    assert "small.png: 90x20 pixels, smaller than 32" in done.stderr
    # 96 x 64 pixels: columns at 0, 24, 48 and, because 16 pixels would be lost, 64; rows at 0, 24 and 32
    names = sorted(path.name for path in (out / "sub").glob("photo6_*.png"))
    assert names == [f"photo6_s{number:03d}.png" for number in range(1, 13)]
    whole = load_image(photos / "sub" / "photo6.png")
    np.testing.assert_array_equal(load_image(out / "sub" / "photo6_s001.png"), whole[:32, :32])
    np.testing.assert_array_equal(load_image(out / "sub" / "photo6_s012.png"), whole[32:, 64:])

    kept = (out / "photo0_s001.png").stat().st_mtime_ns
    (out / "photo0_s002.png").unlink()
    done = script("cut_subimages", photos, out, "--size", 32, "--step", 24, "--slack", 4, code=1)
    assert "1 sub-images made" in done.stdout
    assert (out / "photo0_s002.png").is_file()
    assert (out / "photo0_s001.png").stat().st_mtime_ns == kept
    assert not list(out.rglob("*.part"))


def test_cutting_into_itself_or_by_nonsense_is_refused(script, photos: Path, tmp_path: Path):
    before = sorted(photos.rglob("*"))
    assert "must lie outside" in script("cut_subimages", photos, photos / "out", code=2).stderr
    assert "--step" in script("cut_subimages", photos, tmp_path / "out", "--step", 9999, code=2).stderr
    assert sorted(photos.rglob("*")) == before


def test_manifest_of_folders(script, photos: Path, tmp_path: Path):
    (photos / "photo1.png").write_bytes(b"damaged")
    manifest = tmp_path / "lists" / "train.csv"
    manifest.parent.mkdir()
    # an earlier run that was stopped has noted one image, with a hash that shows where it came from
    (tmp_path / "lists" / "train.csv.rows").write_text(f"{photos / 'photo0.png'},72,64,noted\n")
    done = script("make_manifest", manifest, photos, photos / "sub", "--weight", 1, 2.5, code=1)
    assert "photo1.png: cannot be read" in done.stderr
    rows = read_rows(manifest)
    assert len(rows) == 8
    assert rows[0] == ("../photos/photo0.png", 72, 64, "noted", 1.0)
    assert rows[1].hash == file_hash(photos / "photo2.png")
    assert [row.weight for row in rows] == 6 * [1.0] + 2 * [2.5]
    assert all(Path(path).is_file() for path in read_manifest(manifest).paths)
    assert not (tmp_path / "lists" / "train.csv.rows").exists()

    (photos / "photo3.png").unlink()
    done = script("make_manifest", manifest, "--check", code=1)
    assert "6 of 8 images" in done.stdout
    assert "photo3.png" in done.stderr
    assert "photo0.png: the content differs" in done.stderr


def test_wrong_manifest_calls_write_nothing(script, photos: Path, tmp_path: Path):
    assert "as many weights" in script("make_manifest", "m.csv", photos, "--weight", 1, 2, code=2).stderr
    assert ".csv" in script("make_manifest", "m.json", photos, code=2).stderr
    assert "there is none" in script("make_manifest", "m.csv", photos / "absent", code=2).stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("m.")]
