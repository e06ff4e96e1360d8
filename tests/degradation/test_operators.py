"""Every operator against an independent one: basicsr, libjpeg by Pillow, torch's interpolate."""

from __future__ import annotations

import io
import math
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from morsr.degradation import DegradationRecipe
from morsr.degradation.basicsr_compat import import_basicsr
from morsr.degradation.reference import reference_kernels
from morsr.errors import InputError, MissingDependencyError
from morsr.functional import corrupt, kernels


@pytest.fixture(scope="module")
def operators() -> ModuleType:
    try:
        return import_basicsr("data.degradations")
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """(1, 3, 192, 160) crop of a photograph with edges, flat parts and saturated colour."""
    from skimage import data

    pixels = data.astronaut()[20:212, 150:310]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _psnr(first: Tensor, second: Tensor) -> float:
    return -10 * math.log10((first - second).double().square().mean().item() + 1e-20)


# ------------------------------------------------------------------------------------------------------ kernels


def test_kernels_equal_basicsr(operators: ModuleType) -> None:
    parameters = DegradationRecipe().sample(torch.arange(120))
    for blur in (parameters.first.blur, parameters.second.blur, parameters.final.blur):
        ours = kernels.blur_kernels(**vars(blur))
        torch.testing.assert_close(ours, reference_kernels(blur), rtol=0, atol=1e-6)
    assert parameters.first.blur.kind.unique().numel() == 7  # the six kinds and the sinc


@settings(max_examples=20)
@given(st.integers(0, 2**40))
def test_kernels_sum_to_one_and_keep_to_their_size(key: int) -> None:
    blur = DegradationRecipe().sample(torch.tensor([key])).first.blur
    kernel = kernels.blur_kernels(**vars(blur))[0]
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(kernel, kernel.flip(0, 1), rtol=0, atol=1e-7)  # every kind is symmetric about its centre
    margin = 10 - int(blur.size) // 2
    inside = kernel[margin : 21 - margin, margin : 21 - margin]
    assert inside.abs().sum().item() == pytest.approx(kernel.abs().sum().item(), abs=1e-6)


def test_wrong_kernel_sizes_are_refused() -> None:
    blur = DegradationRecipe().sample(2).first.blur
    for size in (8, 23):
        with pytest.raises(InputError, match="odd sizes"):
            kernels.blur_kernels(**{**vars(blur), "size": torch.tensor([7, size])})


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (2, 3, 45, 33), (2, 1, 97, 64)])
@pytest.mark.parametrize("way", ["chosen", "frequency"])
def test_filter_equals_basicsr(operators: ModuleType, shape: tuple[int, ...], way: str) -> None:
    filter_2d = import_basicsr("utils.img_process_util").filter2D
    apply = kernels.filter_images if way == "chosen" else kernels._filter_in_frequency
    images = torch.rand(shape, generator=_generator())
    parameters = DegradationRecipe().sample(torch.arange(40))
    every = kernels.blur_kernels(**vars(parameters.first.blur))
    for pair in every.split(2):
        torch.testing.assert_close(apply(images, pair), filter_2d(images, pair), rtol=0, atol=5e-6)
    lopsided = torch.rand(2, 5, 5, generator=_generator(1))  # a correlation and a convolution differ here
    torch.testing.assert_close(apply(images, lopsided), filter_2d(images, lopsided), rtol=1e-5, atol=1e-5)


def test_both_ways_of_filtering_are_used() -> None:
    blur = DegradationRecipe().sample(torch.arange(60)).first.blur
    ways = {kernels._passes(kernel.numpy()) is None for kernel in kernels.blur_kernels(**vars(blur))}
    assert ways == {True, False}


@pytest.mark.parametrize("length", [1, 2, 5, 10, 11, 30])
def test_reflect_pad_is_numpys(length: int) -> None:
    images = torch.rand(1, 2, length, length + 3, generator=_generator())
    expected = np.pad(images.numpy(), ((0, 0), (0, 0), (10, 10), (10, 10)), mode="reflect")
    torch.testing.assert_close(kernels.reflect_pad(images, 10).numpy(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [torch.ones(1, 4, 4), torch.ones(1, 3, 5), torch.ones(3, 5, 5)])
def test_wrong_kernels_are_refused(kernel: Tensor) -> None:
    with pytest.raises(InputError, match="kernels"):
        kernels.filter_images(torch.rand(2, 3, 20, 20), kernel)


# -------------------------------------------------------------------------------------------- resizing, sharpening


@pytest.mark.parametrize("mode", corrupt.RESIZE_MODES)
@pytest.mark.parametrize("scale", [0.15, 0.37, 0.99, 1.0, 1.13, 1.5])
def test_resize_equals_interpolate(mode: str, scale: float) -> None:
    images = torch.rand(1, 3, 61, 48, generator=_generator())
    expected = F.interpolate(images, scale_factor=scale, mode=mode)
    size = (expected.shape[-2], expected.shape[-1])
    torch.testing.assert_close(corrupt.resize(images, size, mode, scale=scale), expected, rtol=0, atol=1e-6)
    expected = F.interpolate(images, size=(31, 77), mode=mode)
    torch.testing.assert_close(corrupt.resize(images, (31, 77), mode), expected, rtol=0, atol=1e-6)


def test_unsharp_mask_equals_basicsr(operators: ModuleType, photograph: Tensor) -> None:
    expected = import_basicsr("utils").USMSharp()(photograph)
    sharpened = corrupt.unsharp_mask(photograph)
    assert (sharpened - photograph).abs().max() > 0.05
    # A difference that lies on the threshold may fall to either side: one pixel of the mask weighs under 5e-4.
    torch.testing.assert_close(sharpened, expected, rtol=0, atol=5e-4)
    assert (sharpened - expected).abs().mean() < 5e-6


# ------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_deviation(gray: bool) -> None:
    image = torch.full((1, 3, 256, 256), 0.5)
    noise = (corrupt.add_gaussian_noise(image, 12.0, gray=gray, generator=_generator(3)) - image) * 255
    assert noise.mean().abs() < 0.24
    assert noise.std().item() == pytest.approx(12, rel=0.01)
    assert bool((noise[:, 0] == noise[:, 1]).all()) == gray


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("levels", [256, 40])
def test_poisson_noise_agrees_with_basicsr(operators: ModuleType, gray: bool, levels: int) -> None:
    ramp = torch.linspace(0, 1, levels).mul(255).round().div(255).repeat_interleave(1024 // levels + 1)[:1024]
    image = ramp.view(1, 1, 1, -1).expand(1, 3, 600, -1).contiguous() * 0.5 + 0.25  # away from the clamp
    image = image.mul(255).round().div(255)
    ours = corrupt.add_poisson_noise(image, 0.7, gray=gray, generator=_generator(5)) - image
    torch.manual_seed(5)
    theirs = operators.add_poisson_noise_pt(image, torch.tensor([0.7]), gray_noise=torch.tensor([float(gray)])) - image
    assert bool((ours[:, 0] == ours[:, 1]).all()) == gray
    # By column, so by level: the mean is zero and the variance grows with the level.
    for ours_part, theirs_part in zip(ours[:, 0].split(128, dim=-1), theirs[:, 0].split(128, dim=-1), strict=True):
        spread = theirs_part.std().item()
        assert abs(ours_part.mean().item()) < 5 * spread / math.sqrt(ours_part.numel())
        assert ours_part.std().item() == pytest.approx(spread, rel=0.02)
        skew = [((part - part.mean()) / part.std()).pow(3).mean().item() for part in (ours_part, theirs_part)]
        assert skew[0] == pytest.approx(skew[1], abs=0.06)


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_is_the_same_in_another_layout(photograph: Tensor, gray: bool) -> None:
    usual, other = photograph.contiguous(), photograph.contiguous(memory_format=torch.channels_last)
    first, second = (corrupt.add_poisson_noise(one, 1.0, gray=gray, generator=_generator()) for one in (usual, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("mean", [0.5, 3.0, 20.0, 128.0, 255.0])
def test_the_poisson_table_is_poisson(mean: float) -> None:
    from scipy import stats

    exponent, level = 8, round(mean * 255 / 256)
    row = corrupt._poisson_alias(torch.device("cpu")).view(9, 256, 512)[exponent, level].double().numpy()
    alias = np.floor(row).astype(int)
    mass = np.zeros(512)
    np.add.at(mass, np.arange(512), (row - alias) / 512)
    np.add.at(mass, alias, (1 - (row - alias)) / 512)
    expected = stats.poisson.pmf(np.arange(512), level * 256 / 255)
    assert np.abs(mass - expected).sum() < 2e-4  # total variation; the table holds 15 bits of every probability


def test_saturated_images_keep_poisson_noise_in_range() -> None:
    for value in (0.0, 1.0):
        noisy = corrupt.add_poisson_noise(torch.full((1, 3, 32, 32), value), 3.0, gray=False, generator=_generator())
        assert noisy.min() >= 0
        assert noisy.max() <= 1
    torch.testing.assert_close(
        corrupt.add_poisson_noise(torch.zeros(1, 3, 32, 32), 3.0, gray=False, generator=_generator()),
        torch.zeros(1, 3, 32, 32),
    )


# -------------------------------------------------------------------------------------------------------- JPEG


def _libjpeg(image: Tensor, quality: int, subsampling: int = 2) -> tuple[Tensor, dict[int, list[int]]]:
    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    decoded = Image.open(buffer)
    tables = decoded.quantization  # type: ignore[attr-defined]
    return torch.from_numpy(np.array(decoded)).permute(2, 0, 1).unsqueeze(0).float() / 255, tables


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 58, 75, 95, 100])
def test_jpeg_tables_equal_libjpegs(quality: int, photograph: Tensor) -> None:
    _, expected = _libjpeg(photograph, quality)
    for ours, theirs in zip(
        corrupt.jpeg_tables(torch.tensor([float(quality)])), (expected[0], expected[1]), strict=True
    ):
        assert ours[0].flatten().int().tolist() == list(theirs)


@pytest.mark.parametrize("quality", [30.0, 62.3, 95.0])
@pytest.mark.parametrize("size", [(64, 96), (61, 43)])
def test_jpeg_equals_basicsr_by_its_tables(operators: ModuleType, quality: float, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=_generator())
    images = F.interpolate(images, scale_factor=0.25, mode="area")  # not pure noise
    images = F.interpolate(images, size=size, mode="bicubic").clamp(0, 1)
    expected = import_basicsr("utils").DiffJPEG(differentiable=False)(images, quality=torch.full((2,), quality))
    ours = corrupt.jpeg(images, torch.full((2,), quality), tables="basicsr")
    # A coefficient that lies on a rounding edge may fall to either side: all but a few blocks agree to 1e-5.
    difference = (ours - expected).abs()
    assert difference.quantile(0.97).item() < 1e-5
    assert _psnr(ours, expected) > 60


@pytest.mark.parametrize(("quality", "least"), [(30, 38.0), (60, 40.0), (80, 42.0), (95, 44.0)])
def test_jpeg_is_close_to_libjpeg(photograph: Tensor, quality: int, least: float) -> None:
    expected, _ = _libjpeg(photograph, quality)
    ours = corrupt.jpeg(photograph, torch.tensor([float(quality)]))
    assert _psnr(ours, expected) > least
    # The loss is of the same size, too, not only close to the result.
    assert _psnr(ours, photograph) == pytest.approx(_psnr(expected, photograph), abs=0.5)


def test_jpeg_qualities_are_per_image(photograph: Tensor) -> None:
    pair = photograph.repeat(2, 1, 1, 1)
    both = corrupt.jpeg(pair, torch.tensor([30.0, 90.0]))
    torch.testing.assert_close(both[1:], corrupt.jpeg(photograph, torch.tensor([90.0])), rtol=0, atol=1e-6)
    assert _psnr(both[:1], photograph) + 3 < _psnr(both[1:], photograph)


@pytest.mark.parametrize("quality", [0.5, 101.0, math.nan])
def test_wrong_qualities_are_refused(quality: float) -> None:
    with pytest.raises(InputError, match="quality"):
        corrupt.jpeg(torch.rand(1, 3, 16, 16), torch.tensor([quality]))


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(InputError, match="libjpeg"):
        corrupt.jpeg_tables(torch.tensor([50.0]), tables="mozjpeg")


def test_full_precision_is_given_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with corrupt.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
