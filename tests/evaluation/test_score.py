"""`morsr score` and `morsr compare`: pairing, every kind of bad input, resuming, and the numbers."""

from __future__ import annotations

import argparse
import csv
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from morsr.cli import main
from morsr.commands import compare, score
from morsr.errors import ConfigError, InputError
from morsr.evaluation import scoring
from morsr.evaluation.comparison import compare_tables
from morsr.evaluation.images import read_header, read_rgb
from morsr.evaluation.scoring import score_folders
from morsr.models import metrics


def command(module: ModuleType, *words: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(word) for word in words]))


def picture(seed: int, size: int = 32) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(image + np.random.default_rng(1).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """gt, lr and two sets of outputs of four images."""
    for name in ("gt", "lr", "good", "bad"):
        (tmp_path / name).mkdir()
    for seed, stem in enumerate(("a", "b", "c", "d")):
        hr = picture(seed)
        Image.fromarray(hr).save(tmp_path / "gt" / f"{stem}.png")
        Image.fromarray(hr).resize((8, 8), Image.Resampling.BOX).save(tmp_path / "lr" / f"{stem}.png")
        Image.fromarray(noisy(hr, 3)).save(tmp_path / "good" / f"{stem}.png")
        Image.fromarray(noisy(hr, 20)).save(tmp_path / "bad" / f"{stem}.png")
    return tmp_path


def quiet(folders: Path, **options):
    options = {"outputs": {"good": folders / "good"}, "hr": folders / "gt", "metrics": ["psnr"], **options}
    return score_folders(progress=False, **options)


def test_score_command(folders: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--pred", folders / "good", f"worse={folders / 'bad'}", "--gt", folders / "gt", "--lr", folders / "lr",
             "--metrics", "psnr,ssim,lpips", "--out", folders / "out", "--jobs", 1,
             "--published", "RealSR")  # fmt: skip
    assert command(score, *words) == 0
    printed = capsys.readouterr().out
    lines = list(csv.DictReader((folders / "out" / "scores.csv").open()))
    assert [line["method"] for line in lines] == ["bicubic"] * 4 + ["good"] * 4 + ["worse"] * 4
    report = json.loads((folders / "out" / "scores.json").read_text())
    assert report["protocol"] == "stablesr"
    assert "alexnet" in report["absent"]["lpips"]
    assert report["summary"]["good"]["mean"]["psnr"] > report["summary"]["worse"]["mean"]["psnr"]
    for text in ("protocol stablesr", "| bicubic |", "| good |", "| worse |", "MoR-DASR (published)"):
        assert text in printed
    assert (folders / "out" / "scores.md").read_text() in printed


def test_published_outputs_of_a_peer(shared_data: Path, tmp_path: Path):
    data = shared_data / "realsr"
    places = {name: tmp_path / name for name in ("osediff", "HR", "LR")}
    for name, place in places.items():
        place.mkdir()
        for path in sorted((data / name).iterdir())[:5]:
            (place / path.name).symlink_to(path)
    report = score_folders({"osediff": places["osediff"]}, places["HR"], places["LR"], ["psnr", "ssim"],
                           out=tmp_path / "out", progress=False)  # fmt: skip
    published = data / "osediff_published_scores.csv"
    found = compare_tables(published, tmp_path / "out" / "scores.csv")
    assert [info.name for info, *_ in found.rows] == ["psnr", "ssim"]
    assert all(abs(value.low) < 1e-4 and abs(value.high) < 1e-4 for *_, value in found.rows)
    assert len(found.unmatched) == 95
    assert report.mean("bicubic", "psnr") > report.mean("osediff", "psnr")


def test_single_files_of_any_name(folders: Path):
    report = quiet(folders, outputs={"x": folders / "good" / "a.png"}, hr=folders / "gt" / "b.png")
    assert report.images == ("a",)
    with pytest.raises(InputError, match="folders everywhere or files everywhere"):
        quiet(folders, outputs={"x": folders / "good" / "a.png"})


def test_without_reference_only_what_needs_none(folders: Path):
    with pytest.raises(ConfigError, match="at least one folder"):
        quiet(folders, outputs={})
    report = quiet(folders, hr=None, metrics=["psnr", "niqe"])
    assert report.absent == {"psnr": "needs reference images (--gt)"}
    assert [i.name for i in report.metrics] == ["niqe"]


def bomb() -> bytes:
    """A PNG that claims to have more pixels than Pillow opens."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def damage(folders: Path, kind: str) -> str:
    """Spoil one file; returns the words that the message must hold."""
    target, image = folders / "good" / "b.png", picture(1)
    if kind == "size":
        Image.fromarray(image[:-2]).save(target)
        return "b.png against b.png: 32x30 against 32x32 px"
    if kind == "depth":
        import cv2

        cv2.imwrite(str(target), image.astype(np.uint16) * 257)
        return "b.png against b.png: 16-bit against 8-bit"
    if kind == "gray":
        Image.fromarray(image[..., 0]).save(target)
        return "b.png against b.png: gray against RGB"
    if kind == "alpha":
        Image.fromarray(image).convert("RGBA").save(target)
        return "b.png against b.png: RGBA against RGB"
    if kind == "transparent":
        Image.fromarray(image).quantize(64).save(target, transparency=3)
        return "b.png against b.png: RGBA against RGB"
    if kind == "animated":
        Image.fromarray(image).save(target, save_all=True, append_images=[Image.fromarray(image[::-1])])
        return "b.png: 2 frames or pages"
    if kind == "bomb":
        target.write_bytes(bomb())
        return "b.png: cannot be read as an image"
    if kind == "missing":
        target.unlink()
        return "good: nothing for b"
    if kind == "extra":
        (folders / "gt" / "b.png").unlink()
        return "gt: nothing for b"
    if kind == "no lr":
        (folders / "lr" / "b.png").unlink()
        return "lr: nothing for b"
    if kind == "twice":
        Image.fromarray(image).save(folders / "good" / "b.jpg")
        return "one stem for several files: b.jpg, b.png"
    target.write_bytes(b"not an image")
    return "b.png: cannot be read as an image"


KINDS = [
    "size", "depth", "gray", "alpha", "transparent", "animated", "bomb", "missing", "extra", "no lr", "twice",
    "unreadable",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_scored_is_named_and_nothing_is_written(folders: Path, kind: str):
    words = damage(folders, kind)
    with pytest.raises(InputError) as error:
        quiet(folders, lr=folders / "lr", out=folders / "out")
    assert words in str(error.value)
    assert "nothing was scored" in str(error.value)
    assert not (folders / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_scored_when_asked_and_the_table_tells(folders: Path, kind: str):
    words = damage(folders, kind)
    report = quiet(folders, lr=folders / "lr", skip_problems=True)
    assert report.images == ("a", "c", "d")
    assert words in report.to_markdown()


def test_sizes_are_cropped_only_when_asked(folders: Path):
    damage(folders, "size")
    Image.fromarray(np.asarray(Image.open(folders / "gt" / "b.png"))[:-2]).save(folders / "good" / "b.png")
    report = quiet(folders, crop=True)
    assert report.values("good", "psnr")["b"] == pytest.approx(80)
    assert "cropped" in report.to_markdown()


def test_16_bits_on_both_sides_are_refused_too(folders: Path):
    import cv2

    for name in ("good", "gt"):
        cv2.imwrite(str(folders / name / "b.png"), picture(1).astype(np.uint16) * 257)
    with pytest.raises(InputError, match=r"b\.png: 16 bits per channel; scores are defined on 8 bits"):
        quiet(folders)


def test_a_file_cut_in_half_is_named_and_the_rest_goes_on(folders: Path, capsys: pytest.CaptureFixture[str]):
    target = folders / "good" / "b.png"
    Image.fromarray(noisy(picture(1, 64), 9)).resize((32, 32)).save(target)
    target.write_bytes(target.read_bytes()[:-900])  # the head is whole
    code = command(score, "--pred", folders / "good", "--gt", folders / "gt", "--metrics", "psnr", "--jobs", 1,
                   "--out", folders / "out")  # fmt: skip
    assert code == 1
    assert "b.png: cannot be decoded" in capsys.readouterr().out
    assert len(list(csv.DictReader((folders / "out" / "scores.csv").open()))) == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hr": "nowhere"}, InputError, "gt: nowhere is neither a folder nor a file"),
        ({"hr": "empty"}, InputError, "gt: empty holds no image"),
        ({"metrics": ["psnrr"]}, ConfigError, "unknown metric 'psnrr'"),
        ({"processes": 0}, ConfigError, "at least one process"),
        ({"outputs": {"bicubic": "good"}, "lr": "lr"}, ConfigError, "a method is called 'bicubic'"),
    ],
)
def test_arguments_that_cannot_work(
    folders: Path, monkeypatch: pytest.MonkeyPatch, options: dict, error: type[Exception], words: str
):
    monkeypatch.setattr(metrics, "_pyiqa_configs", dict)  # importing pyiqa takes seconds
    (folders / "empty").mkdir()
    with pytest.raises(error, match=words):
        quiet(folders, **options)


def test_two_rows_of_one_name(folders: Path):
    with pytest.raises(ConfigError, match="two rows would be called 'good'"):
        score.named_paths([str(folders / "good"), str(folders / "good")])


def test_a_stopped_run_goes_on(folders: Path, monkeypatch: pytest.MonkeyPatch):
    whole = quiet(folders).values("good", "psnr")
    real, seen = scoring.score_image, []

    def stops(metrics, sr, hr):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return real(metrics, sr, hr)

    monkeypatch.setattr(scoring, "score_image", stops)
    with pytest.raises(KeyboardInterrupt):
        quiet(folders, out=folders / "out")
    with (folders / "out" / "progress.jsonl").open("a") as stream:
        stream.write('{"stem": "c", "fi')  # killed in the middle of a line
    counted = []
    monkeypatch.setattr(scoring, "score_image", lambda *a: counted.append(1) or real(*a))
    assert quiet(folders, out=folders / "out").values("good", "psnr") == whole
    assert len(counted) == 2
    counted.clear()
    assert quiet(folders, out=folders / "out").values("good", "psnr") == whole
    assert not counted
    Image.fromarray(picture(9)).save(folders / "good" / "a.png")  # a changed file is scored again, the others not
    changed = quiet(folders, out=folders / "out").values("good", "psnr")
    assert len(counted) == 1
    assert changed["a"] != whole["a"]
    assert changed["b"] == whole["b"]
    quiet(folders, out=folders / "out", metrics=["ssim"])  # other metrics start anew
    assert len(counted) == 5


def test_results_are_kept_by_what_the_files_stood_for(folders: Path):
    both = {"one": folders / "good", "two": folders / "bad"}
    first = quiet(folders, outputs=both, out=folders / "out")
    swapped = quiet(folders, outputs={"two": both["one"], "one": both["two"]}, out=folders / "out")
    assert swapped.values("two", "psnr") == first.values("one", "psnr") != first.values("two", "psnr")
    renamed = quiet(folders, outputs={"ours": both["one"], "two": both["two"]}, out=folders / "out")
    assert renamed.values("ours", "psnr") == first.values("one", "psnr")


@pytest.fixture
def nested(folders: Path) -> Path:
    """The same with an image of one more "a" in a subfolder, a JPEG among the references."""
    for seed, name in ((7, "gt/sub/a.jpg"), (8, "lr/sub/a.png"), (9, "good/sub/a.png")):
        (folders / name).parent.mkdir()
        Image.fromarray(picture(seed, 8 if name.startswith("lr") else 32)).save(folders / name)
    return folders


def test_subfolders_are_scored_under_their_paths(nested: Path, monkeypatch: pytest.MonkeyPatch):
    report = quiet(nested, lr=nested / "lr", out=nested / "out")
    assert report.images == ("a", "b", "c", "d", "sub/a")
    lines = list(csv.DictReader((nested / "out" / "scores.csv").open()))
    assert [line["image"] for line in lines if line["method"] == "good"] == list(report.images)
    assert {row["image"] for row in json.loads((nested / "out" / "scores.json").read_text())["per_image"]} == {
        *report.images
    }
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_image", lambda *a: pytest.fail("scored again"))
        again = quiet(nested, lr=nested / "lr", out=nested / "out")
    assert again.values("good", "psnr") == report.values("good", "psnr")
    found = compare_tables(nested / "out" / "scores.csv", nested / "out" / "scores.csv", method_a="bicubic")
    assert found.rows[0][3].count == 5
    (nested / "good" / "sub" / "a.png").unlink()
    with pytest.raises(InputError, match="good: nothing for sub/a"):
        quiet(nested)
    Image.fromarray(picture(1, 30)).save(nested / "good" / "sub" / "a.png")
    with pytest.raises(InputError, match=r"sub/a\.png against a\.jpg: 30x30"):
        quiet(nested)


def test_a_folder_of_inputs_below_the_references_is_not_one_of_them(folders: Path):
    (folders / "lr").rename(folders / "gt" / "lr")
    assert quiet(folders, lr=folders / "gt" / "lr").images == ("a", "b", "c", "d")


def test_the_contact_sheet_of_degrade_is_no_input(folders: Path):
    Image.fromarray(picture(3)).save(folders / "lr" / "contact_sheet.png")
    assert quiet(folders, lr=folders / "lr").images == ("a", "b", "c", "d")


def test_images_that_are_not_read_are_told_of(folders: Path):
    (folders / "good" / "e.HEIC").write_bytes(b"")
    report = quiet(folders)
    assert report.problems == ["good: 1 file has an ending that is not read and was left out (.heic 1)"]
    assert not report.incomplete


def test_endings_that_tell_images_apart_can_be_compared(folders: Path):
    for name in ("gt", "good"):
        (folders / name / "a.png").rename(folders / name / "a.jpg.png")
        (folders / name / "b.png").rename(folders / name / "a.png.png")
    report = quiet(folders, out=folders / "out")
    assert report.images == ("a.jpg", "a.png", "c", "d")
    found = compare_tables(folders / "out" / "scores.csv", folders / "out" / "scores.csv")
    assert (found.rows[0][3].count, found.unmatched) == (4, [])


@pytest.mark.slow
def test_processes_give_the_same_rows(folders: Path):
    one, two = quiet(folders, lr=folders / "lr"), quiet(folders, lr=folders / "lr", processes=2)
    assert one.to_csv() == two.to_csv()


def test_headers_tell_what_is_inside(tmp_path: Path, shared_data: Path):
    expected = {
        "tree_alpha_16bit.png": ("RGBA", 16),
        "children-alpha.png": ("RGBA", 8),
        "00017_gray.png": ("gray", 8),
        "wolf_gray.jpg": ("gray", 8),
        "0014.jpg": ("RGB", 8),
    }
    for name, (kind, bits) in expected.items():
        header = read_header(shared_data / "odd_images" / name)
        assert (header.kind, header.bits) == (kind, bits), name


def test_turned_photographs_are_turned_back(tmp_path: Path):
    image = Image.fromarray(picture(0)[:20])
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    header = read_header(tmp_path / "turned.png")
    assert (header.width, header.height) == (20, 32)
    assert read_rgb(tmp_path / "turned.png").shape == (32, 20, 3)


def test_a_rotation_of_another_kind_turns_nothing(folders: Path):
    words = struct.pack("<HHI4s", 274, 2, 4, b"6up\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + words + bytes(4)
    for name in ("good", "gt"):
        Image.fromarray(picture(1)[:20]).save(folders / name / "b.png", exif=exif)
    header = read_header(folders / "good" / "b.png")
    assert (header.width, header.height) == (32, 20)
    assert quiet(folders).values("good", "psnr")["b"] == 80


def test_two_transparent_files_are_refused_too(folders: Path):
    for name in ("good", "gt"):
        Image.fromarray(picture(1)[..., 0]).save(folders / name / "b.png", transparency=7)
    with pytest.raises(InputError, match=r"b\.png: gray with alpha channels; expected gray or RGB"):
        quiet(folders)
    for name in ("good", "gt"):
        Image.fromarray(picture(1)).save(folders / name / "b.png", transparency=(0, 0, 0))
    with pytest.raises(InputError, match=r"b\.png: RGBA channels"):
        quiet(folders)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pred good --metrics psnr", "none of the metrics can be computed: psnr needs reference images"),
        ("--pred good --gt gt --metrics lpips --no-download", "none of the metrics can be computed: lpips "),
        ("--pred good --gt gt --metrics ,", "expected at least one metric"),
    ],
)
def test_nothing_scored_is_an_error(
    folders: Path, options: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folders)
    assert main(["score", *options.split(), "--out", "out", "--jobs", "1"]) == 2
    told = capsys.readouterr().err
    assert "morsr: " in told
    assert words in told
    assert not Path("out", "scores.csv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_utf_8_are_written_with_escapes(folders: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("gt", "good"):
        (folders / name / "b.png").rename(folders / name / os.fsdecode(b"caf\xe9.png"))
    words = ("--pred", folders / "good", "--gt", folders / "gt", "--metrics", "psnr", "--jobs", 1,
             "--out", folders / "out")  # fmt: skip
    for _ in range(2):  # the second goes on from the journal
        assert command(score, *words) == 0
    lines = list(csv.DictReader((folders / "out" / "scores.csv").open(encoding="utf-8")))
    assert [line["image"] for line in lines] == ["a", "c", "caf\\udce9", "d"]


def test_compare_command(folders: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("good", "bad"):
        quiet(folders, outputs={name: folders / name}, lr=folders / "lr", out=folders / f"out-{name}")
    a, b = (folders / f"out-{name}" / "scores.csv" for name in ("good", "bad"))
    assert command(compare, a, b, "--json", folders / "difference.json") == 0
    printed = capsys.readouterr().out
    assert "B is worse" in printed
    assert "95% interval" in printed
    data = json.loads((folders / "difference.json").read_text())["metrics"]["psnr"]
    assert data["difference"] == pytest.approx(data["b"] - data["a"])
    assert data["high"] < 0
    assert data["count"] == 4
    command(compare, a, a)
    assert "not distinguishable" in capsys.readouterr().out


def test_tables_that_cannot_be_compared(folders: Path):
    table = folders / "a.csv"
    for text, words in (
        ("", "column 'image'"),
        ("name,psnr\na,1\n", "column 'image'"),
        ("image,psnr\na,many\n", "line 2: expected a number for psnr, got 'many'"),
        ("image,psnr\na.png,1\na.png,2\n", "line 3: a stands twice"),
        ("image,ssim\na,1\n", "no metric in common"),
        ("image,psnr\nz,1\n", "no image in common"),
    ):
        other = folders / "other.csv"
        other.write_text("image,psnr\na,1\nb,2\n")
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            compare_tables(table, other)
    with pytest.raises(InputError, match="cannot be read as a table"):
        compare_tables(folders / "absent.csv", table)
    table.write_text("image,method,psnr\na,x,1\na,y,2\n")
    with pytest.raises(ConfigError, match="several methods, name one with --method-a: x, y"):
        compare_tables(table, table)
    with pytest.raises(ConfigError, match="no method 'z'"):
        compare_tables(table, table, method_a="z")
    assert compare_tables(table, table, method_a="x", method_b="y").rows[0][3].mean == 1
