"""PSNR-Y and SSIM-Y against published rows and an independent library, the Fréchet distance, the bootstrap."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from morsr.errors import InputError
from morsr.functional.quality import bootstrap_mean, frechet_distance, psnr_y, quantize_8bit, rgb_to_y, ssim_y
from morsr.functional.utilization import spearman


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def patterned_pair() -> tuple[np.ndarray, np.ndarray]:
    """Two images (200, 296, 3) made of whole numbers only, so that every machine has the same ones."""
    y, x = np.mgrid[:200, :296]
    hr = np.stack([(3 * x + 5 * y + x * y // 16 + 40 * c) % 256 for c in range(3)], -1).astype(np.uint8)
    error = (x * y % 17 - 8)[..., None] * np.array([1, 2, -1])
    return np.clip(hr.astype(int) + error, 0, 255).astype(np.uint8), hr


def test_golden_of_pyiqa():
    # options = {"device": "cpu", "test_y_channel": True, "color_space": "ycbcr"}          (pyiqa 0.1.16)
    # pyiqa.create_metric("psnr", **options)(sr, hr), pyiqa.create_metric("ssim", **options)(sr, hr)
    sr, hr = map(as_tensor, patterned_pair())
    torch.testing.assert_close(psnr_y(sr, hr), torch.tensor([32.72863007], dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(ssim_y(sr, hr), torch.tensor([0.96915960], dtype=torch.float64), atol=1e-6, rtol=0)


def test_every_published_row(shared_data: Path):
    folder = shared_data / "realsr"
    rows = list(csv.DictReader((folder / "osediff_published_scores.csv").open()))
    assert len(rows) == 100
    psnr, ssim = [], []
    for row in rows:
        sr, hr = (as_tensor(np.array(Image.open(folder / kind / row["image"]))) for kind in ("osediff", "HR"))
        psnr.append(psnr_y(sr, hr).item())
        ssim.append(ssim_y(sr, hr).item())
    np.testing.assert_allclose(psnr, [float(row["psnr_y"]) for row in rows], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ssim, [float(row["ssim_y"]) for row in rows], atol=1e-5, rtol=0)
    assert f"{np.mean(psnr):.4f} {np.mean(ssim):.4f}" == "25.1511 0.7341"


@pytest.mark.slow
def test_agrees_with_pyiqa_live():
    pyiqa = pytest.importorskip("pyiqa")
    options = {"device": "cpu", "test_y_channel": True, "color_space": "ycbcr"}
    sr, hr = torch.rand(2, 2, 3, 40, 53)
    torch.testing.assert_close(
        psnr_y(sr, hr), pyiqa.create_metric("psnr", **options)(sr, hr).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        ssim_y(sr, hr), pyiqa.create_metric("ssim", **options)(sr, hr).double(), atol=1e-6, rtol=0
    )


def test_luma_is_studio_swing():
    white, black, green = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1)
    levels = torch.cat([rgb_to_y(image).flatten() for image in (white, black, green)]) * 255
    torch.testing.assert_close(levels, torch.tensor([235.0, 16.0, 144.553]))


@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 2**31))
def test_identity_symmetry_and_batch(height: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 2, 3, height, width, generator=generator)
    torch.testing.assert_close(psnr_y(a, a), torch.full((2,), 80.0, dtype=torch.float64))
    torch.testing.assert_close(ssim_y(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(psnr_y(a, b), psnr_y(b, a))
    torch.testing.assert_close(ssim_y(a, b), ssim_y(b, a))
    torch.testing.assert_close(torch.cat([ssim_y(a[:1], b[:1]), ssim_y(a[1:], b[1:])]), ssim_y(a, b))
    assert (ssim_y(a, b) >= 0).all()
    assert (psnr_y(a, b) < 80).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_the_pixels_that_it_holds(dtype: torch.dtype):
    hr, noise = torch.rand(2, 1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    sr, hr = (hr * 0.9 + noise * 0.1).to(dtype), hr.to(dtype)
    for metric in (psnr_y, ssim_y):
        torch.testing.assert_close(metric(sr, hr), metric(sr.float(), hr.float()), rtol=0, atol=0)


def test_psnr_of_a_known_error():
    # A step of 10 levels on every channel moves luma by 10 * 219 / 255 levels.
    a, b = torch.full((1, 3, 16, 16), 100 / 255), torch.full((1, 3, 16, 16), 110 / 255)
    assert psnr_y(a, b).item() == pytest.approx(-10 * np.log10((10 * 219 / 255 / 255) ** 2 + 1e-8), abs=1e-6)


def test_quantize_is_what_a_png_holds():
    values = torch.tensor([-0.5, 0.0, 0.001, 0.5, 0.9999, 1.5])
    torch.testing.assert_close(quantize_8bit(values) * 255, torch.tensor([0.0, 0, 0, 128, 255, 255]))


@pytest.mark.parametrize(
    ("sr", "hr", "words"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "one size"),
        (torch.full((1, 3, 16, 16), 255.0), torch.zeros(1, 3, 16, 16), "sr: expected finite values"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), float("nan")), "hr: expected finite values"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), "3 channels"),
    ],
)
def test_what_cannot_be_compared(sr: torch.Tensor, hr: torch.Tensor, words: str):
    for metric in (psnr_y, ssim_y):
        with pytest.raises(InputError, match=words):
            metric(sr, hr)


def test_ssim_says_that_its_window_does_not_fit():
    with pytest.raises(InputError, match="at least 11 px"):
        ssim_y(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def test_frechet_distance_against_the_matrix_square_root():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(50, 8, generator=generator, dtype=torch.float64) * 1.5 + 0.3
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ s2 @ root).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * trace
    torch.testing.assert_close(frechet_distance(a, b), expected)
    torch.testing.assert_close(frechet_distance(a, a), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    few = frechet_distance(a[:3], b[:4])  # fewer samples than features: singular covariances
    assert torch.isfinite(few)
    assert few > 0
    with pytest.raises(InputError, match="N >= 2"):
        frechet_distance(a[:1], b)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.integers(0, 100))
def test_bootstrap_properties(values: list[float], seed: int):
    sample = np.array(values)
    mean, low, high = bootstrap_mean(sample, resamples=300, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert mean == pytest.approx(sample.mean())
    assert bootstrap_mean(sample, resamples=300, seed=seed) == (mean, low, high)
    shifted = bootstrap_mean(sample + 10, resamples=300, seed=seed)
    assert shifted == pytest.approx((mean + 10, low + 10, high + 10))


def test_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        _, low, high = bootstrap_mean(generator.normal(0.5, 1, 40), resamples=400, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_bootstrap_of_groups_is_wider_where_they_hang_together():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    values = generator.normal(0, 1, 12)[groups] + generator.normal(0, 0.1, 120)
    _, low, high = bootstrap_mean(values)
    _, group_low, group_high = bootstrap_mean(values, groups=groups)
    assert group_high - group_low > 2 * (high - low)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_bootstrap_refuses_what_has_no_mean(values: list):
    with pytest.raises(InputError, match="finite number"):
        bootstrap_mean(np.array(values))


def test_a_rank_correlation_without_a_value_is_nan():
    constant, rising = torch.ones(5), torch.arange(5.0)
    assert np.isnan(spearman(constant, rising))
    assert np.isnan(spearman(rising[:2], rising[:2]))
    assert spearman(rising, rising) == pytest.approx(1.0)
