"""`morsr degrade`, in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.cli_parser import call
from morsr.commands import degrade as command
from morsr.degradation import DegradationParameters, apply
from morsr.errors import ConfigError, InputError


def _run(*arguments: str) -> int:
    return call(command.run, "degrade", [str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from skimage import data

    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:98, :131]).save(folder / "a.png")
    Image.fromarray(data.coffee()[:64, :80]).save(folder / "more" / "b.jpg", quality=95)
    Image.fromarray(data.camera()[:64, :64]).save(folder / "gray.png")
    return folder


def test_images_that_are_not_read_are_counted(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "more" / "phone.heic").write_bytes(b"of a phone")
    assert _run(photos, tmp_path / "lr") == 0
    assert "1 file with an unsupported extension was left out (.heic 1)" in capsys.readouterr().err


def test_a_folder_with_parameters_that_replay(photos: Path, tmp_path: Path) -> None:
    out, hr = tmp_path / "lr", tmp_path / "hr"
    assert _run(photos, out, "--seed", 3, "--hr", hr) == 0
    text = (out / "parameters.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["file"] for row in rows] == ["a.png", "gray.png", "more/b.png"]
    assert all(0 <= row["severity"]["combined"] <= 1 and row["seed"] == 3 for row in rows)
    parameters = DegradationParameters.from_jsonl(text)
    for place, row in enumerate(rows):
        sharp = np.array(Image.open(hr / row["file"]))
        made = np.array(Image.open(out / row["file"]))
        assert sharp.shape[0] == 4 * made.shape[0]
        assert sharp.shape[1] == 4 * made.shape[1]
        images = torch.from_numpy(sharp).permute(2, 0, 1).unsqueeze(0).float() / 255
        again = (apply(images, parameters[place]) * 255).round()[0].permute(1, 2, 0)
        np.testing.assert_array_equal(again.numpy(), made)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 1000
        assert np.asarray(sheet).std() > 20


def test_an_image_depends_on_its_name_and_the_seed_alone(photos: Path, tmp_path: Path) -> None:
    assert _run(photos, tmp_path / "all") == 0
    assert _run(photos / "a.png", tmp_path / "one") == 0
    assert _run(photos / "a.png", tmp_path / "other", "--seed", 1) == 0
    every, one, other = (np.array(Image.open(tmp_path / name / "a.png")) for name in ("all", "one", "other"))
    np.testing.assert_array_equal(every, one)
    assert (every != other).any()


def test_a_damaged_file_is_named_and_the_rest_is_made(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:500])
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photos / "small.png")
    assert _run(photos, tmp_path / "lr") == 1
    said = capsys.readouterr().err
    assert "broken.png" in said
    assert "small.png" in said
    assert "3 of 5" in said
    assert len((tmp_path / "lr" / "parameters.jsonl").read_text().splitlines()) == 3


def test_wrong_input_is_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr"
    with pytest.raises(ConfigError, match="realesrgan"):
        _run(photos, out, "--recipe", "none")
    with pytest.raises(ConfigError, match="--scale"):
        _run(photos, out, "--scale", 0)
    for device in ("quantum", "meta"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
            _run(photos, out, "--device", device)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ConfigError, match="seed: expected a number of 64 bits"):
            _run(photos, out, f"--seed={seed}")
    with pytest.raises(InputError, match="no such"):
        _run(tmp_path / "nothing", out)
    with pytest.raises(InputError, match="among the inputs"):
        _run(photos, photos)
    with pytest.raises(InputError, match="another folder"):
        _run(photos, out, "--hr", out)
    with pytest.raises(InputError, match="is one of the inputs"):
        _run(photos / "a.png", photos)
    Image.new("RGB", (64, 64)).save(photos / "a.bmp")
    with pytest.raises(InputError, match=r"a\.bmp, a\.png"):
        _run(photos, out)
    assert not out.exists()


def test_an_image_called_as_the_contact_sheet_is_refused(photos: Path, tmp_path: Path) -> None:
    sheet = (photos / "more" / "b.jpg").rename(photos / "more" / "contact_sheet.jpg")
    for source in (photos, sheet):
        with pytest.raises(InputError, match=r"contact_sheet.jpg: its output would be called contact_sheet.png"):
            _run(source, tmp_path / "lr")
    assert not (tmp_path / "lr").exists()


def test_the_sheet_keeps_tiles_and_not_whole_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    real = command.contact_sheet
    monkeypatch.setattr(command, "contact_sheet", lambda shown: kept.extend(shown) or real(shown))
    assert _run(photos / "a.png", tmp_path / "lr", "--hr", tmp_path / "hr") == 0
    ((sharp, low, _),) = kept
    hr, lr = (Image.open(tmp_path / name / "a.png") for name in ("hr", "lr"))
    side = min(lr.size)
    left, top = (lr.width - side) // 2, (lr.height - side) // 2
    box = (left, top, left + side, top + side)
    with Image.open(tmp_path / "lr" / "contact_sheet.png") as sheet:
        for column, (tile, whole, scale, how) in enumerate(
            ((sharp, hr, 4, Image.Resampling.LANCZOS), (low, lr, 1, Image.Resampling.NEAREST))
        ):
            expected = np.asarray(whole.crop(tuple(scale * edge for edge in box)).resize((192, 192), how))
            np.testing.assert_array_equal(np.asarray(tile), expected)
            at = 8 + column * 200
            np.testing.assert_array_equal(np.asarray(sheet)[8:200, at : at + 192], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_utf_8_is_kept(photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "a.png").rename(photos / name)
    assert _run(photos, tmp_path / "lr") == 0
    assert (tmp_path / "lr" / name).is_file()
    rows = [json.loads(line) for line in (tmp_path / "lr" / "parameters.jsonl").read_text().splitlines()]
    assert name in {row["file"] for row in rows}


def test_outputs_among_the_inputs_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lr: the outputs would lie among the inputs; choose a folder that is neither"):
        _run(photos, photos / "lr")
    with pytest.raises(InputError, match="sharp: the outputs would lie among the inputs"):
        _run(photos, tmp_path / "lr", "--hr", photos / "more" / "sharp")
    with pytest.raises(InputError, match="among the inputs"):
        _run(photos, tmp_path)
    assert not (tmp_path / "lr").exists()
    assert _run(photos / "more", photos / "lr") == 0
    with pytest.raises(InputError, match=r"lr: holds parameters.jsonl, so outputs of an earlier run lie among"):
        _run(photos, tmp_path / "lr")
    assert _run(photos / "lr", tmp_path / "twice") == 0, "a folder of outputs may be degraded again"


def test_outputs_that_exist_are_kept(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr"
    assert _run(photos, out) == 0
    before = (out / "a.png").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        _run(photos, out, "--seed", 1)
    assert (out / "a.png").read_bytes() == before
    assert _run(photos, out, "--seed", 1, "--overwrite") == 0
    assert (out / "a.png").read_bytes() != before


def test_a_killed_run_goes_on_and_ends_alike(photos: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _run(photos, whole) == 0
    assert _run(photos, cut) == 0
    lines = (cut / "parameters.jsonl").read_text().splitlines(keepends=True)
    (cut / "parameters.jsonl").write_text(lines[0] + lines[1][:40])  # killed while it wrote the second line
    (cut / "more" / "b.png").unlink()
    made = (cut / "a.png").stat().st_mtime_ns
    assert _run(photos, cut) == 0
    assert (cut / "a.png").stat().st_mtime_ns == made
    for name in ("parameters.jsonl", "a.png", "gray.png", "more/b.png", "contact_sheet.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    for other in (["--seed", 1], ["--scale", 2], ["--recipe", "pisasr"]):
        with pytest.raises(InputError, match="--overwrite"):
            _run(photos, cut, *other)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="a superuser can write anywhere")
def test_a_read_only_output_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "locked"
    out.mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot be written"):
        _run(photos, out)


def test_an_output_that_is_a_file_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        _run(photos, tmp_path / "file" / "lr")
