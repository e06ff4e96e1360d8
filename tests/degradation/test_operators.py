"""Every operator against an independent one: basicsr, libjpeg by Pillow, torch's interpolate, scipy."""

import io
import math

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from torch import Tensor

from morsr.degradation import DegradationRecipe
from morsr.functional import corrupt, kernels


@pytest.fixture(scope="module")
def photograph():
    """(1, 3, 192, 160) crop of a photograph with edges, flat parts and saturated colour."""
    from skimage import data

    pixels = data.astronaut()[20:212, 150:310]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kernels_equal_basicsr():
    parameters = DegradationRecipe().sample(torch.arange(120))
    for blur in (parameters.first.blur, parameters.second.blur, parameters.final.blur):
        torch.testing.assert_close(kernels.blur_kernels(**vars(blur)), oracle.kernels(blur), rtol=0, atol=1e-6)
    assert parameters.first.blur.kind.unique().numel() == 7  # the six kinds and the sinc


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (2, 3, 45, 33), (2, 1, 97, 64)])
def test_filter_equals_basicsr(shape):
    images = torch.rand(shape, generator=_generator())
    every = kernels.blur_kernels(**vars(DegradationRecipe().sample(torch.arange(40)).first.blur))
    for pair in every.split(2):
        expected = oracle.FILTER.filter2D(images, pair)
        torch.testing.assert_close(kernels.filter_images(images, pair), expected, rtol=0, atol=5e-6)
    lopsided = torch.rand(2, 5, 5, generator=_generator(1))  # a correlation and a convolution differ here
    expected = oracle.FILTER.filter2D(images, lopsided)
    torch.testing.assert_close(kernels.filter_images(images, lopsided), expected, rtol=1e-5, atol=1e-5)


def test_unsharp_mask_equals_basicsr(photograph):
    sharpened, expected = corrupt.unsharp_mask(photograph), oracle.UTILS.USMSharp()(photograph)
    assert (sharpened - photograph).abs().max() > 0.05
    # A difference that lies on the threshold may fall to either side: one pixel of the mask weighs under 5e-4.
    torch.testing.assert_close(sharpened, expected, rtol=0, atol=5e-4)
    assert (sharpened - expected).abs().mean() < 5e-6


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_deviation(gray):
    image = torch.full((1, 3, 256, 256), 0.5)
    noise = (corrupt.add_gaussian_noise(image, 12.0, gray=gray, generator=_generator(3)) - image) * 255
    assert noise.mean().abs() < 0.24
    assert noise.std().item() == pytest.approx(12, rel=0.01)
    assert bool((noise[:, 0] == noise[:, 1]).all()) == gray


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("levels", [256, 40])
def test_poisson_noise_agrees_with_basicsr(gray, levels):
    ramp = torch.linspace(0, 1, levels).mul(255).round().div(255).repeat_interleave(1024 // levels + 1)[:1024]
    image = ramp.view(1, 1, 1, -1).expand(1, 3, 600, -1).contiguous() * 0.3 + 0.5  # away from the clamp
    image = (image * torch.tensor([1.0, 0.75, 0.6]).view(1, 3, 1, 1)).mul(255).round().div(255)
    ours = corrupt.add_poisson_noise(image, 0.7, gray=gray, generator=_generator(5)) - image
    torch.manual_seed(5)
    reference = oracle.OPERATORS.add_poisson_noise_pt
    theirs = reference(image, torch.tensor([0.7]), gray_noise=torch.tensor([float(gray)])) - image
    assert (((ours[:, 0] - ours[:, 1]).abs() < 1e-6).float().mean().item() > 0.99) == gray
    # By column, so by level: the mean is zero and the variance grows with the level.
    for ours_part, theirs_part in zip(ours[:, 0].split(128, dim=-1), theirs[:, 0].split(128, dim=-1), strict=True):
        spread = theirs_part.std().item()
        assert abs(ours_part.mean().item()) < 5 * spread / math.sqrt(ours_part.numel())
        assert ours_part.std().item() == pytest.approx(spread, rel=0.02)
        skew = [((part - part.mean()) / part.std()).pow(3).mean().item() for part in (ours_part, theirs_part)]
        assert skew[0] == pytest.approx(skew[1], abs=0.06)


def _libjpeg(image: Tensor, quality: int) -> tuple[Tensor, dict[int, list[int]]]:
    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
    decoded = Image.open(buffer)
    tables = decoded.quantization  # type: ignore[attr-defined]
    return torch.from_numpy(np.array(decoded)).permute(2, 0, 1).unsqueeze(0).float() / 255, tables


@pytest.mark.parametrize("quality", [1, 30, 49, 50, 75, 95, 100])
def test_jpeg_tables_equal_libjpegs(quality, photograph):
    _, expected = _libjpeg(photograph, quality)
    for place, ours in enumerate(corrupt.jpeg_tables(torch.tensor([float(quality)]))):
        assert ours[0].flatten().int().tolist() == list(expected[place])


@pytest.mark.parametrize("quality", [30.0, 62.3, 95.0])
def test_jpeg_equals_basicsr_by_its_tables(quality, photograph, monkeypatch):
    images = torch.cat([photograph, photograph.flip(-1)])
    qualities = torch.tensor([quality, 80.0])
    monkeypatch.setattr(corrupt, "jpeg_tables", oracle.jpeg_tables)
    ours, expected = corrupt.jpeg(images, qualities), oracle.diff_jpeg(images, qualities)
    # A coefficient that lies on a rounding edge may fall to either side: all but a few blocks agree to 1e-5.
    assert (ours - expected).abs().quantile(0.97).item() < 1e-5
    assert (ours - expected).double().square().mean() < 1e-6
