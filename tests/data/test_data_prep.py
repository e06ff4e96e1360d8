"""The scripts that prepare data: what they write, going on after a stop, and what they say about bad files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from morsr.data.images import load_image
from morsr.data.manifests import file_hash, read_manifest, read_rows
from morsr.errors import InputError

NOTED = "0" * 32
"""The hash of an image that a run has noted, which no image has."""


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts as modules."""
    found = {}
    for name in ("cut_subimages", "make_manifest"):
        path = Path(__file__).resolve().parents[2] / "data_prep" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    return found


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


def test_photographs_of_one_name_are_not_cut(script, photos: Path, tmp_path: Path):
    Image.new("RGB", (96, 64)).save(photos / "photo0.jpg")
    done = script("cut_subimages", photos, tmp_path / "out", "--size", 32, "--step", 24, code=2)
    assert "images of one name would share their sub-images: photo0.jpg, photo0.png" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sub_images_cut_otherwise_are_refused(scripts, tmp_path: Path):
    keep, settings = scripts["cut_subimages"].keep_settings, {"size": 32, "step": 24, "slack": 4}
    keep(tmp_path, {**settings, "size": 48})
    keep(tmp_path, settings)  # nothing was cut yet
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "sub" / "a_s001.png")
    for changed in ({"size": 48}, {"step": 32}, {"slack": 0}):
        with pytest.raises(InputError, match="holds sub-images cut otherwise"):
            keep(tmp_path, {**settings, **changed})
    (tmp_path / "cuts.json").unlink()
    with pytest.raises(InputError, match=r"a_s001.png of 32x32 pixels"):
        keep(tmp_path, {**settings, "size": 48})
    keep(tmp_path, settings)
    assert (tmp_path / "cuts.json").is_file()


def test_rows_that_were_cut_short_are_made_again(scripts, tmp_path: Path):
    rows = tmp_path / "m.csv.rows"
    for tail in (f"d.png,72,64,{'2' * 31}", f"d.png,72,64,{'2' * 32}", f"d.png,72,64,{'2' * 20}\r\n", '"d\n', "d,1"):
        text = f'"a\nb.png",72,64,{"0" * 32}\r\nc\udce9.png,72,64,{"1" * 32}\r\n' + tail
        rows.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert list(scripts["make_manifest"].noted_rows(rows, hashed=True)) == ["a\nb.png", "c\udce9.png"]
        assert rows.read_bytes().decode("utf-8", "surrogateescape").endswith("1\r\n")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_utf_8_is_passed_over_and_named(scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"plain.png"):
        Image.new("RGB", (8, 8)).save(os.path.join(folder, os.fsdecode(name)))
    assert scripts["make_manifest"].main([str(tmp_path / "m.csv"), str(folder), "--workers", "1"]) == 1
    assert r"caf\udce9.png: expected a name in UTF-8" in capsys.readouterr().err
    assert [row.path for row in read_rows(tmp_path / "m.csv")] == ["photos/plain.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--workers", "0"], "--workers: expected at least 1, got 0"), (["--weight", "nan"], "weights above 0"),
     (["--weight", "inf"], "weights above 0"), (["--check", "--workers", "0"], "--workers: expected")],
)  # fmt: skip
def test_wrong_numbers_are_refused(
    scripts, photos: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert scripts["make_manifest"].main([str(tmp_path / "m.csv"), str(photos), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.csv").exists()


def test_manifest_of_folders(script, photos: Path, tmp_path: Path):
    (photos / "photo1.png").write_bytes(b"damaged")
    manifest = tmp_path / "lists" / "train.csv"
    manifest.parent.mkdir()
    # an earlier run that was stopped has noted one image, with a hash that shows where it came from
    (tmp_path / "lists" / "train.csv.rows").write_text(f"{photos / 'photo0.png'},72,64,{NOTED}\n")
    done = script("make_manifest", manifest, photos, photos / "sub", "--weight", 1, 2.5, code=1)
    assert "photo1.png: cannot be read" in done.stderr
    rows = read_rows(manifest)
    assert len(rows) == 8
    assert rows[0] == ("../photos/photo0.png", 72, 64, NOTED, 1.0)
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
