"""What happens to a picture on its way to a low-quality copy: resizing, sensor noise, JPEG, unsharp masking."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from morsr.functional.color import LUMA
from morsr.functional.kernels import filter_images

RESIZE_MODES = ("area", "bilinear", "bicubic")

_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_CHROMA_TO_RGB = ((0.0, 1.402), (-0.344136, -0.714136), (1.772, 0.0))
_GRAY = (0.2989, 0.587, 0.114)

# The tables of annex K of the JPEG standard, as libjpeg uses them: rows are vertical frequencies.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


def resize(images: Tensor, size: tuple[int, int], mode: str, *, scale: float | None = None) -> Tensor:
    """Resize (B, C, H, W) to (B, C, *size) without antialiasing, as `torch.nn.functional.interpolate` does it.

    Args:
        images: float32.
        size: height and width of the result, each at least 1.
        mode: "area", "bilinear" or "bicubic".
        scale: the factor that places the samples of the bilinear and bicubic modes; None takes the ratio of the sizes.
    """
    if tuple(images.shape[-2:]) == tuple(size) and scale in (None, 1.0):
        return images
    if mode == "area":
        return F.adaptive_avg_pool2d(images, size)
    if scale is not None and tuple(int(length * scale) for length in images.shape[-2:]) == tuple(size):
        return F.interpolate(images, scale_factor=scale, mode=mode)
    return F.interpolate(images, size=size, mode=mode)


def add_gaussian_noise(image: Tensor, sigma: float, *, gray: bool, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise to one image and clamp to [0, 1].

    Args:
        image: (1, 3, H, W) float32.
        sigma: standard deviation, in levels of 255.
        gray: the same noise in all channels.
        generator: source of the noise, on the image's device.

    Source: basicsr/data/degradations.py, add_gaussian_noise_pt.
    """
    _, _, height, width = image.shape
    noise = torch.randn((1, 1 if gray else 3, height, width), generator=generator, device=image.device)
    return noise.mul_(sigma / 255).add(image).clamp_(0, 1)


def add_poisson_noise(image: Tensor, scale: float, *, gray: bool, generator: torch.Generator) -> Tensor:
    """Add shot noise to one image and clamp to [0, 1].

    The image is read in 8 bits; a pixel of level l counts v*l/255 photons on average, v the number of different levels
    in the image rounded up to a power of two; the deviation from that mean, divided by v, is scaled and added.

    Args:
        image, generator: as for `add_gaussian_noise`.
        scale: factor on the noise.
        gray: count the photons of the gray image, and give every channel the same noise.

    Source: basicsr/data/degradations.py, add_poisson_noise_pt. Counts are drawn by the alias method (Walker 1977): 256
        levels have 256 distributions, and a table look-up is far cheaper than a rejection sampler per pixel.
    """
    source = (image * image.new_tensor(_GRAY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True) if gray else image
    level = source.mul(255).round_().clamp_(0, 255)
    index = level.to(torch.int32)
    exponent = torch.log2(_count_levels(index)).ceil_().to(torch.int32)

    table = _poisson_alias(image.device)
    draw = torch.rand(index.shape, generator=generator, device=image.device).mul_(_COUNTS)
    count = draw.floor()
    index = index.mul_(_COUNTS).add_(count.to(torch.int32)).add_(exponent * (256 * _COUNTS))
    entry = table.index_select(0, index.reshape(-1)).view_as(draw)
    other = entry.floor()
    count = torch.where(draw.sub_(count) < entry.sub_(other), count, other)
    noise = count.div_(torch.exp2(exponent.to(torch.float32))).sub_(level.div_(255))
    return noise.mul_(scale).add(image).clamp_(0, 1)


def _count_levels(index: Tensor) -> Tensor:
    """How many of the 256 levels occur, as a float32 scalar tensor; no wait for the device."""
    return torch.zeros(256, device=index.device).index_fill_(0, index.reshape(-1).to(torch.int64), 1).sum()


_COUNTS = 512  # photon counts a table row distinguishes; the largest mean is 256, 16 deviations below


@functools.lru_cache(maxsize=8)
def _poisson_alias(device: torch.device) -> Tensor:
    """(9 * 256 * 512,) float32, alias + probability, of Poisson(2^e * level / 255) for e = 0..8 and 256 levels."""
    mean = (2.0 ** np.arange(9)[:, None] * np.arange(256)[None] / 255).reshape(-1, 1)
    count = np.arange(_COUNTS)[None]
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, _COUNTS)))))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mass = np.where(mean > 0, count * np.log(mean) - mean - log_factorial, np.where(count == 0, 0.0, -np.inf))
    mass = np.exp(log_mass)
    weight = mass / mass.sum(axis=1, keepdims=True) * _COUNTS

    # Walker's construction, all rows side by side: the lightest open cell of a row is topped up by its heaviest one.
    rows = np.arange(len(weight))
    probability, alias, open_cells = np.ones_like(weight), np.tile(np.arange(_COUNTS), (len(weight), 1)), weight.copy()
    order = np.argsort(weight, axis=1, kind="stable")
    light, heavy = np.zeros(len(weight), dtype=np.int64), np.full(len(weight), _COUNTS - 1)
    pending = np.full(len(weight), -1)
    for _ in range(_COUNTS - 1):
        top = order[rows, heavy]
        # A heavy cell that has fallen under 1 becomes the next one to be topped up.
        cell = np.where(pending >= 0, pending, order[rows, light])
        light = np.where(pending >= 0, light, light + 1)
        probability[rows, cell] = open_cells[rows, cell]
        alias[rows, cell] = top
        open_cells[rows, top] -= 1 - open_cells[rows, cell]
        fallen = open_cells[rows, top] < 1
        pending = np.where(fallen, top, -1)
        heavy = np.where(fallen, np.maximum(heavy - 1, 0), heavy)
    packed = alias + np.clip(probability, 0.0, 1 - 2.0**-14)
    with torch.inference_mode(False):
        return torch.from_numpy(packed.astype(np.float32).reshape(-1)).to(device)


def jpeg_tables(quality: Tensor) -> tuple[Tensor, Tensor]:
    """Quantisation tables of luma and chroma, (B, 8, 8) each, for JPEG qualities (B,) in [1, 100], rounded first.

    Whole numbers, as real encoders write them; rows are vertical frequencies.

    Source: libjpeg, jcparam.c, jpeg_quality_scaling and jpeg_add_quant_table.
    """
    whole = quality.double().round().view(-1, 1, 1)
    percent = torch.where(whole < 50, (5000 / whole).floor(), 200 - 2 * whole)
    luma = whole.new_tensor(LUMA_TABLE)
    chroma = torch.full_like(luma, 99)
    chroma[:4, :4] = whole.new_tensor(_CHROMA_CORNER)
    luma, chroma = (((table * percent + 50) / 100).floor().clamp(1, 255).float() for table in (luma, chroma))
    return luma, chroma


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Compress and decompress by JPEG with 4:2:0 chroma: what the quantisation of the coefficients leaves.

    Chroma is averaged over 2 x 2 pixels and repeated on the way back. Borders are completed to 16 x 16 units by the
    last row and column, as libjpeg does it.

    Args:
        images: (B, 3, H, W) float32 in [0, 1]; so is the result, not rounded to 8 bits.
        quality: (B,) in [1, 100].

    Source: ITU-T T.81; libjpeg. Chroma as in basicsr/utils/diffjpeg.py.
    """
    height, width = images.shape[-2:]
    below, right = -height % 16, -width % 16
    if below or right:
        images = F.pad(images, (0, right, 0, below), mode="replicate")
    levels = images.mul(255).sub_(128)
    luma = torch.einsum("bchw,c->bhw", levels, images.new_tensor(LUMA)).unsqueeze(1)
    chroma = torch.einsum("bchw,dc->bdhw", F.avg_pool2d(levels, 2), images.new_tensor(_CHROMA))

    luma_table, chroma_table = (table.to(images.device) for table in jpeg_tables(quality))
    luma, chroma = _quantise_plane(luma, luma_table), _quantise_plane(chroma, chroma_table)
    color = torch.einsum("bdhw,cd->bchw", chroma, images.new_tensor(_CHROMA_TO_RGB))
    restored = F.interpolate(color, scale_factor=2, mode="nearest").add_(luma)
    return restored.add_(128).clamp_(0, 255).div_(255)[..., :height, :width]


def _quantise_plane(planes: Tensor, table: Tensor) -> Tensor:
    """Cosine transform, quantise and restore (B, C, H, W) planes block by block; table (B, 8, 8)."""
    columns = planes.shape[-1] // 8
    basis = _dct_basis(planes.device)
    blocks = rearrange(planes, "b c (h p) (w q) -> b (c h w) (p q)", p=8, q=8)
    steps = rearrange(table, "b v h -> b 1 (v h)")
    coefficients = (blocks @ basis.mT).div_(steps).round_().mul_(steps)
    blocks = coefficients @ basis
    return rearrange(blocks, "b (c h w) (p q) -> b c (h p) (w q)", c=planes.shape[1], w=columns, p=8, q=8)


def dct_matrix() -> Tensor:
    """(8, 8) float64 orthonormal cosine transform of a line of 8 pixels: frequency by pixel."""
    place, frequency = torch.arange(8, dtype=torch.float64), torch.arange(8, dtype=torch.float64).view(-1, 1)
    line = torch.cos((2 * place + 1) * frequency * (math.pi / 16)) / 2
    line[0] /= math.sqrt(2)
    return line


@functools.lru_cache(maxsize=8)
def _dct_basis(device: torch.device) -> Tensor:
    """(64, 64) orthonormal two-dimensional cosine transform of an 8 x 8 block: frequency by pixel."""
    with torch.inference_mode(False):
        return torch.kron(dct_matrix(), dct_matrix()).to(torch.float32).to(device)


def unsharp_mask(images: Tensor) -> Tensor:
    """Sharpen images (B, 3, H, W) in [0, 1] as Real-ESRGAN does its targets: edges above 10 levels of 255, by half.

    Source: basicsr/utils/img_process_util.py, USMSharp: a Gaussian of 51 pixels, weight 0.5, threshold 10.
    """
    sigma = 0.3 * (25 - 1) + 0.8  # OpenCV's for a side of 51 pixels
    line = torch.exp(-torch.arange(-25, 26, dtype=torch.float64).square() / (2 * sigma**2))
    line = line / line.sum()
    kernel = torch.outer(line, line).to(torch.float32).unsqueeze(0).to(images.device)
    residual = images - filter_images(images, kernel)
    mask = filter_images((residual.abs() * 255 > 10).to(torch.float32), kernel)
    return images + mask * ((images + 0.5 * residual).clamp(0, 1) - images)
