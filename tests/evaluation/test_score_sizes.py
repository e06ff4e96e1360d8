"""`morsr score`: the bicubic row of images whose sides are no multiples, deep PPM files, and how paths may look."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morsr.commands.score import add_arguments, named_paths
from morsr.errors import ConfigError, InputError
from morsr.evaluation.classical import bicubic
from morsr.evaluation.folders import enlarged_size
from morsr.evaluation.images import read_header
from morsr.evaluation.scoring import score_folders


def picture(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.mark.parametrize("hr_size", [(79, 63), (76, 63), (78, 60)])
def test_the_bicubic_row_is_enlarged_as_the_outputs_are(tmp_path: Path, hr_size: tuple[int, int]) -> None:
    hr = picture(*hr_size)
    lr = np.asarray(Image.fromarray(hr[:76, :60]).resize((15, 19), Image.Resampling.BICUBIC))
    places = [save(tmp_path / name / "a.png", image)
              for name, image in (("out", bicubic(lr, 76, 60)), ("gt", hr), ("lr", lr))]  # fmt: skip
    report = score_folders({"out": places[0]}, *places[1:], ["psnr"], crop=True, progress=False)
    assert report.values("bicubic", "psnr") == report.values("out", "psnr")


@pytest.mark.parametrize(
    ("lr", "sizes", "expected"),
    [
        ((20, 15), [(80, 60), (83, 61)], (80, 60)),  # the output's scale
        ((20, 15), [(79, 58), (80, 60)], (80, 60)),  # the reference's
        ((20, 15), [(77, 58), (83, 61)], (80, 60)),  # both were cropped
        ((20, 15), [(78, 58), (78, 58)], (80, 60)),
        ((20, 15), [(83, 62), (83, 62)], (83, 62)),  # nothing was cropped: a scale that is not whole
        ((20, 16), [(50, 40), (53, 41)], (50, 40)),
        ((20, 15), [(20, 15)], (20, 15)),
        ((15, 20), [(80, 60)], None),  # turned
        ((20, 20), [(80, 60)], None),
        ((80, 60), [(20, 15)], None),  # exchanged
    ],
)
def test_the_size_an_input_is_enlarged_to(
    lr: tuple[int, int], sizes: list[tuple[int, int]], expected: tuple[int, int] | None
) -> None:
    assert enlarged_size(lr, sizes) == expected


def test_an_input_that_is_turned_is_named(tmp_path: Path) -> None:
    hr = picture(64, 48)
    for name in ("a.png", "b.png"):
        save(tmp_path / "gt" / name, hr)
        save(tmp_path / "out" / name, hr)
        save(tmp_path / "lr" / name, hr[::4, ::4] if name == "a.png" else np.rot90(hr[::4, ::4]))
    places = ({"out": tmp_path / "out"}, tmp_path / "gt", tmp_path / "lr", ["psnr"])
    with pytest.raises(InputError, match=r"b\.png: expected an input that one scale enlarges to 48x64 px, got 16x12"):
        score_folders(*places, progress=False)
    report = score_folders(*places, progress=False, skip_problems=True)
    assert report.images == ("a",)
    assert "b.png" in report.to_markdown()


@pytest.mark.parametrize(
    ("head", "channels", "bits"),
    [
        (b"P6\n# made here\n8 8\n65535\n", 3, 16),
        (b"P6 8 8 1023\n", 3, 10),
        (b"P5 8 8 65535\n", 1, 16),
        (b"P6 8 8 255\n", 3, 8),
    ],
)
def test_deep_ppm_files_are_refused(tmp_path: Path, head: bytes, channels: int, bits: int) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(head + bytes(64 * channels * (2 if bits > 8 else 1)))
    assert read_header(path).bits == bits
    if bits > 8:
        with pytest.raises(InputError, match=f"a.ppm: {bits} bits per channel; scores are defined on 8 bits"):
            score_folders({"x": path}, path, metrics=["psnr"], progress=False)


def test_a_row_without_a_name_is_refused(tmp_path: Path) -> None:
    for text in (f"={tmp_path}", f" ={tmp_path}", "/"):
        with pytest.raises(ConfigError, match="expected a name for the row, --pred NAME=/"):
            named_paths([text])


def test_rows_given_one_after_another_are_all_there() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["--pred", "a=x", "b=y", "--pred", "c=z"]).pred == ["a=x", "b=y", "c=z"]


def test_paths_may_start_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("gt", "out"):
        save(tmp_path / name / "a.png", picture(64, 48))
    save(tmp_path / "lr" / "a.png", picture(64, 48)[::4, ::4])
    assert named_paths(["~/out", "ours=~/out"]) == {"out": tmp_path / "out", "ours": tmp_path / "out"}
    score_folders({"ours": "~/out"}, "~/gt", "~/lr", ["psnr"], out="~/scores", progress=False)
    assert (tmp_path / "scores" / "scores.csv").is_file()
