"""Raw image statistics that follow noise, blur, JPEG and resizing; pure functions of native crops (N, 3, h, w).

Planes are in grey levels of 255; a statistic is one float32 number per crop, mostly a logarithm. Letters in shapes:
N crops, M blocks of 8 x 8, F frequencies, h and w pixels (at least 16 each).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.estimators.filters import Taps, constant, filtered, median, quantile
from morsr.functional.color import LUMA
from morsr.functional.corrupt import LUMA_TABLE, dct_matrix

BAND_EDGES = (0.0, 0.06, 0.14, 0.27, 0.75)  # cycles per pixel; the last reaches past the corner of the spectrum
# zigzag ranges of the 8 x 8 DCT (sum of the two indices), from coarse to fine
DCT_RANGES = {"coarse": (1, 3), "middle": (3, 6), "fine": (6, 9), "finest": (9, 15)}
# the low coefficients that JPEG keeps, by (row, column)
LOW_PLACES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3), (3, 0), (1, 3), (3, 1))
QUALITIES = tuple(range(20, 98, 3))
FREQUENCIES = 40  # of the periodicity, from 0.05 to 0.5 cycles per pixel
LAGS = 4  # of the autocorrelation, each way

# The second difference, and a sixth of it; the same of a line at half resolution, 4 more pixels repeated. The order
# matters where a flat area has to give 0 exactly: whole numbers first.
SECOND, SECOND_SIXTH = (Taps((unit, -2 * unit, unit), (1, 1)) for unit in (1.0, 1 / 6))
HALF, HALF_SIXTH = (
    Taps((unit / 2, unit / 2, -unit, -unit, unit / 2, unit / 2), (0, 4), stride=2) for unit in (1.0, 1 / 6)
)
BOX = Taps((1.0,) * 9, (4, 4), "constant")
# the two parts of Sobel's mask, and both after a Gaussian of sigma 1
SMOOTH, STEP = Taps((0.125, 0.25, 0.125)), Taps((1.0, 0.0, -1.0))
_GAUSSIAN = np.exp(-0.5 * np.arange(-2.0, 3.0) ** 2)
SMOOTH_AFTER, STEP_AFTER = (
    Taps(tuple(np.convolve(_GAUSSIAN / _GAUSSIAN.sum(), part.kernel)), (2, 2)) for part in (SMOOTH, STEP)
)

STATISTICS = (  # names of what `image_statistics` gives
    *("band_low", "band_mid", "band_high", "band_top", "low_to_high", "noise", "noise_half", "noise_median"),
    *("noise_blocks", "noise_chroma", "noise_chroma_blocks", "noise_next"),
    *("block", "block_zeros", "block_zeros_fine", "table"),
    *(
        f"dct_{name}_{part}" if part else f"chroma_{name}"
        for name in DCT_RANGES
        for part in ("flat", "usual", "busy", "")
    ),
    *("edge_ratio", "edge_ratio_strong", "gradient_loss", "gradient_top", "contrast"),
    *("gradient_next", "gradient_second", "gradient_tail"),
)


def _log(values: Tensor, floor: float = 0.1) -> Tensor:
    return (values + floor).log()


class Planes(NamedTuple):
    """What the statistics read of crops: see `color_planes`, `noise_statistics`, `block_dct` and `table_agreement`.

    Attributes:
        colors, residual: (N, 6, h, w), of R, G, B, luma and chroma.
        luma: (N, h, w).
        dct: (N, 3, 64, M), of luma and chroma.
        agreement: (N, qualities).
    """

    colors: Tensor
    residual: Tensor
    luma: Tensor
    dct: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, crops: Tensor) -> Planes:
        """Planes of crops (N, 3, h, w) in [0, 1] with sides of at least 16."""
        colors = color_planes(crops)
        dct = block_dct(colors[:, 3:])
        residual = filtered(colors, SECOND, SECOND_SIXTH)
        return cls(colors, residual, colors[:, 3], dct, table_agreement(dct[:, 0]))


def color_planes(crops: Tensor) -> Tensor:
    """R, G, B, luma and the two BT.601 chroma planes (N, 6, h, w) of crops, in grey levels of 255."""
    return (_color_matrix(crops.device) @ crops.flatten(2)).unflatten(2, crops.shape[2:])


@constant
def _color_matrix() -> Tensor:
    rgb, luma = torch.eye(3, dtype=torch.float64), torch.tensor([LUMA], dtype=torch.float64)
    return 255 * torch.cat([rgb, luma, (rgb[2:] - luma) * 0.564, (rgb[:1] - luma) * 0.713])


# spectrum


def spectrum_statistics(luma: Tensor) -> Tensor:
    """Logarithms of the shares of the spectrum's energy in 4 radial bands, and of the low half over the high half.

    A constant image is all low band.

    Source: the frequency features of FreqOrtho-SR, here on the LR image itself and under a Hann window, without which
    the jump between opposite borders fills the high bands.
    """
    window, masks = _hann(*luma.shape[-2:], luma.device), _band_masks(*luma.shape[-2:], luma.device)
    centred = luma - (luma * window).sum(dim=(-2, -1), keepdim=True) / window.sum()
    bands = torch.fft.rfft2(centred * window).abs().square().flatten(1) @ masks
    bands = bands + bands.new_tensor([1e-3, 0.0, 0.0, 0.0])
    shares = (bands / bands.sum(dim=-1, keepdim=True)).clamp_min(1e-7)
    halves = shares.unflatten(1, (2, 2)).sum(dim=-1).log()
    return torch.cat([shares.log(), halves[:, :1] - halves[:, 1:]], dim=1)


@constant
def _hann(height: int, width: int) -> Tensor:
    """A Hann window (h, w) of unit energy."""
    window = torch.outer(*(torch.hann_window(side, periodic=False) for side in (height, width)))
    return window / window.norm()


@constant
def _band_masks(height: int, width: int) -> Tensor:
    """Which frequencies of `rfft2` belong to which band (places, bands)."""
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    # a column strictly between 0 and Nyquist stands for its mirror image too
    twice = torch.full((width // 2 + 1,), 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    masks = torch.stack([(radius >= low) & (radius < high) for low, high in itertools.pairwise(BAND_EDGES)])
    return (masks * twice).flatten(1).T.contiguous()


# noise


def noise_statistics(planes: Planes) -> Tensor:
    """Noise level (log grey levels) in the flattest tenth of the blocks, by Immerkaer's difference of two Laplacians.

    It is a sixth of the second difference each way, which is blind to smooth gradients and to edges. The mean of R, G
    and B makes gray and coloured noise of one sigma count the same. `noise_half` is taken at half resolution, where
    noise that was resized or compressed still shows; `noise_next` is the correlation of neighbours in the filtered
    image, which tells noise of single pixels from noise that was spread.

    Source: J. Immerkaer, Fast noise variance estimation, 1996 (the mask); the flat-block quantile replaces its mean.
    """
    inner = planes.residual[..., 1:-1, 1:-1]
    power = F.avg_pool2d(inner.square(), 8, stride=4).flatten(2)  # of half-overlapping 8 x 8 blocks
    gray, coloured = power[:, :3].mean(dim=1).sqrt(), power[:, 4:].mean(dim=1).sqrt()
    half = filtered(planes.colors[:, :3], HALF, HALF_SIXTH).square().mean(dim=1, keepdim=True)
    halved = F.avg_pool2d(half, 8, stride=4).flatten(1).sqrt()
    luma = inner[:, 3]
    across = (luma[..., 1:] * luma[..., :-1]).mean(dim=(1, 2))
    down = (luma[..., 1:, :] * luma[..., :-1, :]).mean(dim=(1, 2))
    levels = [
        quantile(gray, 0.1),
        quantile(halved, 0.1),
        median(luma[:, ::2, ::2].abs().flatten(1)),
        median(gray),
        quantile(coloured, 0.1),
        median(coloured),
    ]
    following = (across + down) / (2 * (luma.square().mean(dim=(1, 2)) + 0.01))
    return torch.cat([_log(torch.stack(levels, dim=1)), following[:, None]], dim=1)


# blocks


def block_dct(planes: Tensor) -> Tensor:
    """Orthonormal 8 x 8 DCT of whole blocks from the upper left corner on: (N, C, h, w) to (N, C, 64, M)."""
    height, width = planes.shape[-2:]
    blocks = F.pixel_unshuffle(planes[..., : height // 8 * 8, : width // 8 * 8], 8).flatten(2).unflatten(1, (-1, 64))
    return _dct_basis(planes.device) @ blocks


@constant
def _dct_basis() -> Tensor:
    return torch.kron(dct_matrix(), dct_matrix())


def table_agreement(coefficients: Tensor) -> Tensor:
    """How well the standard table of each of `QUALITIES` explains DCT coefficients (N, 64, M): (N, qualities).

    In a JPEG that was not resized since, every coefficient is a multiple of its step, so the mean cosine of
    2 pi c / step over the coefficients that are not quantised to zero is near 1 at the right quality.
    """
    steps = _table_steps(coefficients.device)
    value = coefficients[:, None, [8 * row + column for row, column in LOW_PLACES]]  # (N, 1, places, M)
    usable = (value.abs() > 0.6 * steps) & (steps >= 3)
    return (torch.cos(2 * math.pi / steps * value) * usable).sum(dim=(-2, -1)) / (usable.sum(dim=(-2, -1)) + 8)


@constant
def _table_steps() -> Tensor:
    """Steps (qualities, places, 1) of the standard table."""
    factor = torch.tensor([50 / quality if quality < 50 else 2 - quality / 50 for quality in QUALITIES])
    table = torch.tensor([float(LUMA_TABLE[row][column]) for row, column in LOW_PLACES])
    return (factor[:, None] * table).round().clamp_min(1)[..., None]


def _table_fit(agreement: Tensor) -> Tensor:
    """100 minus the quality by what `table_agreement` gives; 0 where no table fits.

    A divisor of the steps does as well: the lowest quality that comes close to the best is taken.
    """
    best = agreement.amax(dim=-1)
    first = (agreement > 0.6 * best[:, None]).float().argmax(dim=-1)
    return (100 - QUALITIES[0] - (QUALITIES[1] - QUALITIES[0]) * first) * (best > 0.35)


@constant
def _on_grid(length: int) -> Tensor:
    """Means (length, 2) of a line of steps between pixels: of those across the borders of 8 pixels, and the others."""
    on = torch.arange(length) % 8 == 7
    masks = torch.stack([on, ~on], dim=1).float()
    return masks / masks.sum(dim=0)


@constant
def _range_masks() -> Tensor:
    """Means (ranges, 64) of the coefficients of each range."""
    order = torch.arange(8)[:, None] + torch.arange(8)[None, :]
    masks = torch.stack([((order >= low) & (order < high)).float() for low, high in DCT_RANGES.values()])
    return (masks / masks.sum(dim=(1, 2), keepdim=True)).flatten(1)


def block_statistics(planes: Planes) -> Tensor:
    """Traces of a grid of blocks, and the energy of the blocks' DCT coefficients in flat, usual and busy blocks.

    `block` compares the steps across the 8-pixel grid with the others (log ratio, 0 without JPEG). `block_zeros`
    compares how many coefficients are not zero on the grid and half a block away from it. `table` is 100 minus the
    quality of the table that fits (0 where none does).
    """
    luma, aligned = planes.luma, planes.dct[:, 0]
    lines = [luma.diff(dim=-1).abs().mean(dim=-2), luma.diff(dim=-2).abs().mean(dim=-1)]
    jumps = torch.stack([line @ _on_grid(line.shape[-1], line.device) for line in lines]).sum(dim=0)
    grid = _log(jumps)
    thresholds = luma.new_tensor([1.5, 0.5])[:, None, None]
    on, off = (
        _log((part[:, None, 1:].abs() > thresholds).float().mean(dim=(-2, -1)), 0.01)
        for part in (aligned, block_dct(luma[:, None, 4:-4, 4:-4])[:, 0])
    )
    energy = _range_masks(luma.device) @ planes.dct.square()  # (N, 3, ranges, M)
    colour = median(energy[:, 1:].mean(dim=1).sqrt())
    level = energy[:, 0].sqrt()
    parts = torch.stack([*(quantile(level, share) for share in (0.1, 0.5, 0.9)), colour], dim=-1)  # (N, ranges, 4)
    table = _table_fit(planes.agreement)[:, None]
    return torch.cat([grid[:, :1] - grid[:, 1:], off - on, table, _log(parts).flatten(1)], dim=1)


# blur


def contrast(luma: Tensor) -> Tensor:
    """Log standard deviation of luma (N, h, w), from every second pixel each way."""
    return _log(luma[:, ::2, ::2].flatten(1).std(dim=1))


def blur_statistics(luma: Tensor) -> Tensor:
    """How wide edges are, whatever their height.

    `edge_ratio` is the gradient at strong edges over the gradient there after one more blur of sigma 1: for a step
    edge of width sigma it is sqrt(1 + 1/sigma^2), whatever the step's height. The others are the mean
    loss of gradient under the same blur, neighbour correlations of the gradient, and its tail.

    Source: S. Zhuo, T. Sim, Defocus map estimation from a single image, 2011 (the ratio); the loss of gradient
    follows F. Crete et al., The blur effect, 2007.
    """
    pairs = ((STEP, SMOOTH), (SMOOTH, STEP), (STEP_AFTER, SMOOTH_AFTER), (SMOOTH_AFTER, STEP_AFTER))
    down, across, down_after, across_after = (filtered(luma, *pair) for pair in pairs)
    before = (down.square() + across.square()).sqrt()
    after = (down_after.square() + across_after.square()).sqrt()
    inner = before[:, 1:-1, 1:-1]
    # the ridge of an edge: the largest gradient along its own direction, to the nearest axis
    level = (across.abs() >= down.abs())[:, 1:-1, 1:-1]
    beside = torch.maximum(before[:, 1:-1, 2:], before[:, 1:-1, :-2])
    above = torch.maximum(before[:, 2:, 1:-1], before[:, :-2, 1:-1])
    peak = inner >= torch.where(level, beside, above)
    usual, strongest, top = (quantile(before[:, ::2, ::2].flatten(1), share) for share in (0.7, 0.9, 0.98))
    strong = peak[:, None] & (inner[:, None] >= torch.stack([usual, strongest], dim=1)[..., None, None])
    # the floors let a flat area count as neither sharp nor blurred
    ratio = ((before + 0.3) / (after + 0.3))[:, None, 1:-1, 1:-1]
    ratios = (ratio * strong).sum(dim=(2, 3)) / strong.sum(dim=(2, 3)).clamp_min(1)
    levels = _log(torch.stack([after.mean(dim=(1, 2)), before.mean(dim=(1, 2)), top], dim=1))
    spread = contrast(luma)[:, None]
    edges = [ratios, levels[:, :1] - levels[:, 1:2], levels[:, 2:] - spread, spread]

    step = luma.diff(dim=-1)
    square = step.square()
    power = square.mean(dim=(1, 2)) + 0.01
    following = [(step[..., lag:] * step[..., :-lag]).mean(dim=(1, 2)) / power for lag in (1, 2)]
    tail = (square.square().mean(dim=(1, 2)) + 1e-4).log() - 2 * power.log()
    return torch.cat([*edges, torch.stack([*following, tail], dim=1)], dim=1)


def image_statistics(planes: Planes) -> Tensor:
    """All statistics of N crops, as STATISTICS: (N, S)."""
    luma = planes.luma
    parts = [spectrum_statistics(luma), noise_statistics(planes), block_statistics(planes), blur_statistics(luma)]
    return torch.cat(parts, dim=1)


def dct_profile(planes: Planes) -> Tensor:
    """Log energy of every AC coefficient (N, 189): luma of all blocks, of the flattest quarter, and chroma."""
    power = planes.dct[:, :, 1:].square()
    luma = power[:, 0]  # (N, 63, M)
    busy = luma.sum(dim=1)
    flat = (busy <= quantile(busy, 0.25)[:, None]).to(luma.dtype)
    flat_power = (luma @ flat[..., None])[..., 0] / flat.sum(dim=1, keepdim=True).clamp_min(1)
    return _log(torch.cat([luma.mean(dim=-1), flat_power, power[:, 1:].mean(dim=(1, 3))], dim=1), 0.01)


# traces of resizing and JPEG in noise and edges


def periodicity(luma: Tensor) -> Tensor:
    """How strongly the size of differences varies periodically along rows and columns (N, 2 F).

    An enlarged image is smoother at interpolated pixels than at original ones, so the mean size of its first and second
    differences is periodic at the ratio of the two grids; blocks of JPEG are periodic at an eighth of the grid that
    they were made on, and at its multiples. The logarithm of the power at F frequencies over its median, both axes
    added.

    Args:
        luma: (N, h, w) in grey levels of 255.

    Source: A. C. Gallagher, Detection of linear and cubic interpolation in JPEG compressed images, 2005.
    """
    found = []
    for order, dim in itertools.product((1, 2), (-1, -2)):
        line = luma.diff(dim=dim, n=order).abs().log1p().mean(dim=-3 - dim)
        found.append(line @ _fourier(line.shape[-1], line.device))
    power = torch.stack(found, dim=1).square().view(-1, 2, 4, FREQUENCIES).sum(dim=2)  # (N, orders, F)
    logarithm = (power + 1e-7).log()
    return (logarithm - median(logarithm)[..., None]).flatten(1)


@constant
def _fourier(length: int) -> Tensor:
    """Cosines and sines (length, 2 F) of a line, its mean of 13 neighbours taken off, under a Hann window."""
    window = torch.hann_window(length, periodic=False, dtype=torch.float64)
    frequency = torch.linspace(0.05, 0.5, FREQUENCIES, dtype=torch.float64)
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] * frequency
    basis = torch.cat([phase.cos(), phase.sin()], dim=1) * (window / window.norm())[:, None]
    lines = torch.eye(length, dtype=torch.float64)[:, None]
    smooth = F.avg_pool1d(F.pad(lines, (6, 6), mode="reflect"), 13, stride=1)
    return (lines - smooth)[:, 0] @ basis


def noise_shape(residual: Tensor) -> Tensor:
    """Autocorrelation of what Immerkaer's mask leaves in the flatter part of a crop, in luma and both chroma planes.

    White noise, noise that was enlarged or filtered since, and noise that JPEG took from the fine coefficients differ
    in it, whatever their level. Per plane LAGS^2 - 1 correlations at lags 0 to LAGS - 1 each way, and the log power:
    (N, 3 LAGS^2).

    Args:
        residual: (N, 3, h, w).
    """
    activity = filtered(residual.abs(), BOX, BOX)
    bound = quantile(activity[..., ::2, ::2].flatten(2), 0.4)  # of every second pixel each way: enough
    flat = (activity <= bound[..., None, None]).to(residual.dtype)
    height, width = residual.shape[-2:]
    ahead = F.pad(residual * flat, (0, LAGS - 1, 0, LAGS - 1)).unfold(-2, height, 1).unfold(-2, width, 1)
    products = (ahead * residual[:, :, None, None]).sum(dim=(-2, -1))  # (N, 3, lags down, lags right)
    counts = _tails(height, residual.device).T @ flat @ _tails(width, residual.device)
    correlations = (products / counts.clamp_min(1)).flatten(2)
    power = correlations[..., :1] + 0.01
    return torch.cat([correlations[..., 1:] / power, power.log()], dim=-1).flatten(1)


@constant
def _tails(length: int) -> Tensor:
    """Sums (length, LAGS) of a line from its first, second, ... pixel on."""
    return torch.ones(length, LAGS).tril()


def image_traces(planes: Planes) -> Tensor:
    """All traces of N crops: (N, T)."""
    return torch.cat([periodicity(planes.luma), noise_shape(planes.residual[:, 3:]), planes.agreement], dim=1)
