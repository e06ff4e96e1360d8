"""The registry of metrics: what each says of itself, and what happens without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from morsr.errors import ConfigError, InputError, WeightsError
from morsr.models import metrics
from morsr.models.metrics import METRICS, build_metric, build_metrics, metric_info


def test_every_metric_states_what_a_table_needs():
    assert {"psnr", "ssim", "niqe", "lpips", "dists", "musiq", "maniqa", "maniqa-pipal", "clipiqa", "topiq", "tres",
            "fid", "fsim", "gmsd"} <= set(METRICS)  # fmt: skip
    for name, info in METRICS.items():
        assert info.name == name
        assert info.source
        assert info.range
        assert info.kind in ("full", "none", "set")
        assert info.needs_weights == bool(info.weights)
        assert info.arrow in "↑↓"
    assert METRICS["lpips"].lower_is_better
    assert not METRICS["musiq"].lower_is_better
    assert "KonIQ" in METRICS["maniqa"].source
    assert "PIPAL" in METRICS["maniqa-pipal"].source


def test_names_of_published_columns():
    assert metric_info("PSNR_Y").name == "psnr"
    assert metric_info("maniqa_pipal").name == "maniqa-pipal"


def test_unknown_name_lists_near_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_pyiqa_configs", dict)
    with pytest.raises(ConfigError, match=r"unknown metric 'lpisp'.*lpips"):
        metric_info("lpisp")


def test_other_names_of_pyiqa_are_taken_from_it(monkeypatch: pytest.MonkeyPatch):
    entry = {"metric_mode": "NR", "lower_better": True, "score_range": "0, 150"}
    monkeypatch.setattr(metrics, "_pyiqa_configs", lambda: {"brisque": entry})
    info = metric_info("brisque")
    assert (info.kind, info.lower_is_better, info.range, info.pyiqa) == ("none", True, "0, 150", "brisque")


def test_missing_weights_are_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = build_metrics(["lpips", "psnr", "fid"])  # downloads are off in tests (HF_HUB_OFFLINE)
    assert list(found.metrics) == ["psnr"]
    assert "LPIPS_v0.1_alex-df73285e.pth" in found.absent["lpips"]
    assert "alexnet-owt-7be5be79.pth" in found.absent["lpips"]
    assert str(tmp_path) in found.absent["lpips"]
    assert "pt_inception-2015-12-05-6726825d.pth" in found.absent["fid"]


def test_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(metrics, "_reachable", lambda host: False)
    with pytest.raises(WeightsError, match=r"huggingface\.co cannot be reached"):
        build_metric("musiq")


def test_a_broken_file_of_weights_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pyiqa")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "pyiqa" / "musiq_koniq_ckpt-e95806b9.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"cut short")
    with pytest.raises(WeightsError, match=r"musiq could not be loaded from .*musiq_koniq"):
        build_metric("musiq")


@pytest.mark.parametrize("names", [[], ["psnr", "psnr_y"]])
def test_no_metric_or_one_twice(names: list[str]):
    with pytest.raises(ConfigError, match="at least one metric, each once"):
        build_metrics(names)


def test_a_reference_is_needed_and_checked():
    metric = build_metric("psnr")
    with pytest.raises(InputError, match="expected hr, got None"):
        metric(torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match="images of one size"):
        metric(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 18))
    with pytest.raises(ConfigError, match="single images"):
        metric.distance(torch.rand(3, 4), torch.rand(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gmsd", "fsim", "piqe", "nlpd"])
def test_formulas_of_pyiqa_behave(name: str):
    pytest.importorskip("pyiqa")
    metric = build_metric(name)
    clean = torch.rand(1, 3, 8, 12).repeat_interleave(16, -1).repeat_interleave(16, -2)
    noisy = (clean + 0.2 * torch.randn(clean.shape)).clamp(0, 1)
    score, best = metric(noisy, clean), metric(clean, clean)
    assert score.shape == (1,)
    assert score.dtype == torch.float64
    if metric.info.kind == "full":
        assert (score > best) == metric.info.lower_is_better
