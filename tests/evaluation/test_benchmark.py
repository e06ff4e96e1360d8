"""Methods over pairs: rounding, checks, the forms of the report, pictures, and the comparison rows."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.errors import ConfigError, InputError
from morsr.evaluation.benchmark import evaluate
from morsr.evaluation.classical import bicubic, bilateral, classical_methods, estimate_noise, non_local_means
from morsr.evaluation.comparison import compare_tables
from morsr.evaluation.meter import measured
from morsr.evaluation.pictures import detailed_corner, side_by_side
from morsr.evaluation.published import published_datasets, published_rows
from morsr.evaluation.statistics import Interval, paired_difference
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.functional.quality import psnr_y
from morsr.models.metrics import METRICS, Metric, MetricSet


@dataclass
class Given:
    stem: str
    lr: np.ndarray
    hr: np.ndarray


def blobs(size: int, seed: int) -> np.ndarray:
    """A smooth image with some edges, (size, size, 3) uint8."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def given_pairs(count: int = 3) -> list[Given]:
    found = []
    for index in range(count):
        hr = blobs(48, index)
        noise = np.random.default_rng(index).normal(0, 8, (12, 12, 3))
        lr = np.asarray(Image.fromarray(hr).resize((12, 12), Image.Resampling.BOX))
        found.append(Given(f"photo{index}", np.clip(lr + noise, 0, 255).astype(np.uint8), hr))
    return found


def nearest(lr: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="nearest")


def test_report_of_a_run(tmp_path: Path):
    methods = {"bicubic": classical_methods()["bicubic"], "nearest": nearest}
    report = evaluate(methods, given_pairs(), ["psnr", "ssim", "lpips"], out=tmp_path / "out", progress=False,
                      published=published_rows("realsr"))  # fmt: skip
    assert report.methods == ("bicubic", "nearest")
    assert report.images == ("photo0", "photo1", "photo2")
    assert report.reference == "bicubic"
    assert "lpips" in report.absent
    assert report.mean("bicubic", "psnr") > report.mean("nearest", "psnr")
    assert all(row.seconds is not None and row.seconds >= 0 for row in report.rows)

    lines = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert len(lines) == 6
    assert list(lines[0]) == ["image", "method", "psnr", "ssim", "seconds", "memory_mb"]
    assert float(lines[0]["psnr"]) == pytest.approx(report.values("bicubic", "psnr")["photo0"], abs=1e-6)

    data = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert data["protocol"] == "stablesr"
    assert data["images"] == 3
    assert data["metrics"]["psnr"]["better"] == "higher"
    assert data["summary"]["nearest"]["mean"]["psnr"] == pytest.approx(report.mean("nearest", "psnr"))
    difference = data["summary"]["nearest"]["difference to bicubic"]["psnr"]
    assert difference["low"] <= difference["mean"] <= difference["high"] < 0

    text = (tmp_path / "out" / "scores.md").read_text()
    assert "protocol stablesr" in text
    assert "| psnr ↑ |" in text
    assert "MoR-DASR (published)" in text
    assert f"{report.mean('bicubic', 'psnr'):.4f}" in text
    assert "LPIPS_v0.1_alex" in text
    assert "Difference to bicubic" in text

    sheet = np.asarray(Image.open(tmp_path / "out" / "side_by_side.png"))
    assert sheet.shape == (3 * (48 * 2 + 16 + 4), 3 * (48 * 2 + 4), 3)


def test_outputs_are_rounded_to_8_bits_before_scoring():
    pair = given_pairs(1)[0]
    raw = (
        nearest(torch.from_numpy(pair.lr.copy()).permute(2, 0, 1)[None] / 255) * 1.3 + 0.0013
    )  # leaves [0, 1] and the grid
    report = evaluate({"x": lambda lr: raw}, [pair], ["psnr"], progress=False)
    saved = torch.from_numpy((raw[0].clamp(0, 1) * 255).round().byte().numpy())[None] / 255
    truth = torch.from_numpy(pair.hr.copy()).permute(2, 0, 1)[None] / 255
    assert report.values("x", "psnr")["photo0"] == psnr_y(saved, truth).item() != psnr_y(raw.clamp(0, 1), truth).item()


def test_pairs_that_are_read_when_needed():
    class Lazy:
        def load(self) -> Given:
            return given_pairs(1)[0]

    assert evaluate({"x": nearest}, [Lazy()], ["psnr"], progress=False).images == ("photo0",)


def test_intervals_are_per_image_and_again_by_photograph(tmp_path: Path):
    pairs = given_pairs(4)
    for index, pair in enumerate(pairs):
        pair.group = "ab"[index // 2]
    methods = {"bicubic": classical_methods()["bicubic"], "x": nearest}
    report = evaluate(methods, pairs, ["psnr"], out=tmp_path, progress=False)
    images, photographs = report.difference("x", "psnr"), report.difference("x", "psnr", clustered=True)
    assert (images.count, photographs.count) == (4, 2)
    assert images.mean == photographs.mean
    assert "2 photographs resampled" in report.to_markdown()
    assert json.loads(report.to_json())["summary"]["x"]["difference to bicubic, by group"]["psnr"]["count"] == 2
    found = compare_tables(tmp_path / "scores.csv", tmp_path / "scores.csv", method_a="bicubic", method_b="x")
    assert found.rows[0][3].count == 4
    assert found.clustered["psnr"].low == pytest.approx(photographs.low, abs=1e-5)
    assert "by photograph" in found.to_markdown()
    for pair in pairs:  # one image of each is no group, and nothing is said of any
        pair.group = pair.stem
    report = evaluate(methods, pairs, ["psnr"], progress=False)
    assert "resampled" not in report.to_markdown()
    assert "group" not in report.to_csv()


def test_tables_of_file_names_are_compared_as_those_of_stems(tmp_path: Path):
    draws = np.random.default_rng(0)
    level = np.repeat(draws.normal(size=4), 10)  # what the ten degradations of one photograph share
    gain = [value + 0.1 * draws.normal() for value in level]

    def table(name: str, suffix: str, offset: list[float]) -> Path:
        lines = [f"p{n // 10}.v{n % 10}{suffix},p{n // 10},{30 + offset[n]},{50 - offset[n]}" for n in range(40)]
        path = tmp_path / name
        path.write_text("\n".join(["image,group,psnr,beauty", *lines]))
        return path

    plain, better = table("a.csv", "", [0.0] * 40), table("b.csv", "", gain)
    stems = compare_tables(plain, better)
    files = compare_tables(table("c.csv", ".png", [0.0] * 40), table("d.csv", ".PNG", gain))
    assert stems.clustered["psnr"].count == files.clustered["psnr"].count == 4
    assert str(stems.clustered["psnr"]) == str(files.clustered["psnr"])
    assert str(compare_tables(plain, table("e.csv", ".png", gain)).rows[0][3]) == str(stems.rows[0][3])
    told = compare_tables(plain, table("f.csv", "", [1.0 + 0.01 * n for n in range(40)])).to_markdown()
    assert "B is better" in told
    assert "| beauty |" in told
    assert "B is lower" in told


def test_metrics_over_sets_use_the_saved_images():
    def means(sr: torch.Tensor, hr: torch.Tensor | None) -> torch.Tensor:
        return sr.mean(dim=(-2, -1))

    chosen = MetricSet({"fid": Metric(METRICS["fid"], means)}, {})
    same = {f"photo{index}": pair.hr for index, pair in enumerate(given_pairs())}
    truths = iter(same.values())
    methods = {
        "same": lambda lr: torch.from_numpy(next(truths).copy()).permute(2, 0, 1)[None] / 255,
        "dark": lambda lr: torch.zeros(1, 3, 48, 48),
    }
    report = evaluate(methods, given_pairs(), chosen, progress=False)
    assert report.mean("same", "fid") == pytest.approx(0, abs=1e-9)
    assert report.mean("dark", "fid") > 0.01
    assert "fid ↓" in report.to_markdown()


def test_a_metric_without_a_value_is_told():
    report = evaluate({"x": nearest}, given_pairs(), ["psnr", "niqe"], progress=False)
    assert math.isnan(report.mean("x", "niqe"))
    assert len(report.problems) == 3
    assert "x on photo0: niqe: expected at least two blocks" in report.to_markdown()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda lr: lr, r"bad on photo0: expected an output of shape \(1, 3, 48, 48\), got \(1, 3, 12, 12\)"),
        (lambda lr: nearest(lr) * float("nan"), "bad on photo0: the output holds NaN"),
    ],
)
def test_outputs_that_cannot_be_scored(method, words: str):
    with pytest.raises(InputError, match=words):
        evaluate({"bad": method}, given_pairs(), ["psnr"], progress=False)


def test_pairs_that_cannot_be_used():
    pair = given_pairs(1)[0]
    for pairs, words in (
        ([], "at least one pair"),
        ([pair, pair], "two pairs are called 'photo0'"),
        ([Given("wide", pair.lr.astype(np.uint16), pair.hr)], "wide: lr: expected .* uint8"),
        ([Given("gray", pair.lr, pair.hr[..., 0])], "gray: hr: expected"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate({"x": nearest}, pairs, ["psnr"], progress=False)
    with pytest.raises(ConfigError, match="at least one method"):
        evaluate({}, [pair], ["psnr"], progress=False)
    with pytest.raises(ConfigError, match="no method 'ours'"):
        evaluate({"x": nearest}, [pair], ["psnr"], progress=False, reference="ours")


def test_nothing_is_written_when_a_run_fails(tmp_path: Path):
    with pytest.raises(InputError):
        evaluate({"bad": lambda lr: lr}, given_pairs(), ["psnr"], out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_mean_over_fewer_images_says_so():
    rows = [ImageScore("a", "x", {"psnr": 20.0}), ImageScore("b", "x", {"psnr": math.nan})]
    report = BenchmarkReport(rows=rows, metrics=[METRICS["psnr"]])
    assert "20.0000 (n=1)" in report.to_markdown()
    assert ",x,,," in report.to_csv()
    assert json.loads(report.to_json())["per_image"][1]["scores"]["psnr"] is None
    with pytest.raises(ConfigError, match="no method 'y'"):
        report.mean("y", "psnr")
    with pytest.raises(ConfigError, match="no metric 'ssim'"):
        report.mean("x", "ssim")
    with pytest.raises(ConfigError, match="no reference row"):
        report.difference("x", "psnr")


def test_paired_difference_and_its_verdict():
    reference = {f"i{k}": float(k) for k in range(20)}
    better = {name: value + 0.5 + 0.01 * (value % 3) for name, value in reference.items()}
    interval = paired_difference(better, reference)
    assert interval.count == 20
    assert interval.low > 0.49
    assert interval.excludes_zero
    assert interval.verdict(lower_is_better=False) == "better"
    assert interval.verdict(lower_is_better=True) == "worse"
    assert Interval(0.3, 0.3, 0.3, 1).verdict(lower_is_better=False) == "not distinguishable"
    assert Interval(1e-6, 1e-7, 2e-6, 100).verdict(lower_is_better=False) == "not distinguishable"  # rounding
    assert paired_difference({**better, "i0": math.nan}, reference).count == 19
    with pytest.raises(InputError, match="images in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_published_rows_are_the_papers():
    assert {"RealSR", "DRealSR", "DIV2K-Val"} <= set(published_datasets())
    rows = {row.method: row for row in published_rows("realsr")}
    assert rows["MoR-DASR"].scores["psnr"] == 25.32
    assert rows["OSEDiff"].scores["ssim"] == 0.7341
    assert rows["OSEDiff"].source
    assert len(published_rows("DRealSR ablation")) == 5
    assert all(set(row.scores) <= set(METRICS) for name in published_datasets() for row in published_rows(name))
    with pytest.raises(ConfigError, match="known: RealSR"):
        published_rows("urban100")


def test_noise_is_estimated_and_removed():
    clean = blobs(96, 0)
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 12, clean.shape), 0, 255).astype(np.uint8)
    assert estimate_noise(noisy) * 255 == pytest.approx(12, rel=0.15)
    assert estimate_noise(clean) * 255 < 1
    error = np.square(noisy.astype(float) - clean).mean()
    for denoise in (non_local_means, bilateral):
        assert np.square(denoise(noisy).astype(float) - clean).mean() < error / 2
    assert estimate_noise(np.zeros((16, 16, 3), np.uint8)) == 0


def test_comparison_rows_keep_the_contract():
    lr = torch.rand(1, 3, 13, 17)
    for method in classical_methods(2.0).values():
        sr = method(lr)
        assert sr.shape == (1, 3, 26, 34)
        assert sr.min() >= 0
        assert sr.max() <= 1
    constant = np.full((5, 6, 3), 77, np.uint8)
    assert (bicubic(constant, 20, 24) == 77).all()
    with pytest.raises(ConfigError, match="positive scale"):
        classical_methods(0)
    with pytest.raises(InputError, match="uint8"):
        bicubic(constant.astype(float), 20, 24)


def test_sheet_shows_the_window_with_most_detail():
    image = np.zeros((64, 80, 3), np.uint8)
    image[40:56:2, 50:70] = 255
    row, column = detailed_corner(image, 24)
    assert 32 <= row <= 40
    assert 46 <= column <= 50
    sheet = side_by_side([{"a": image, "b": image}], crop=24, zoom=3)
    assert sheet.shape == (24 * 3 + 16 + 4, 2 * (24 * 3 + 4), 3)
    np.testing.assert_array_equal(
        sheet[16:88, :72], image[row : row + 24, column : column + 24].repeat(3, 0).repeat(3, 1)
    )
    for lines in ([], [{}], [{"a": image, "b": image[:-1]}]):
        with pytest.raises(InputError, match="side_by_side"):
            side_by_side(lines)


def test_time_and_memory_are_measured():
    with measured() as used:
        held = np.ones(40 * 2**20, np.uint8)
    assert used.seconds > 0
    assert held.size
    assert used.memory_mb is None or used.memory_mb > 40


def test_csv_reads_back():
    rows = [ImageScore("a,b", "x", {"psnr": 20.123456789}, seconds=0.5)]
    text = BenchmarkReport(rows=rows, metrics=[METRICS["psnr"]]).to_csv()
    assert next(csv.DictReader(io.StringIO(text))) == {
        "image": "a,b", "method": "x", "psnr": "20.123457", "seconds": "0.5000", "memory_mb": "",
    }  # fmt: skip
