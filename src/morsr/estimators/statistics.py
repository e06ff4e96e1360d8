"""Raw image statistics that follow noise, blur, JPEG and resizing; pure functions of native crops (N, 3, h, w).

Planes are in grey levels of 255; a statistic is one float32 number per crop, mostly a logarithm. Letters in shapes:
N crops, M blocks of 8 x 8, F frequencies, h and w pixels (at least 16 each).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from morsr.functional.color import LUMA
from morsr.functional.corrupt import LUMA_TABLE, dct_matrix

BAND_EDGES = (0.0, 0.06, 0.14, 0.27, 0.75)  # cycles per pixel; the last reaches past the corner of the spectrum
BAND_NAMES = ("band_low", "band_mid", "band_high", "band_top")
# zigzag ranges of the 8 x 8 DCT (sum of the two indices), from coarse to fine
DCT_RANGES = {"coarse": (1, 3), "middle": (3, 6), "fine": (6, 9), "finest": (9, 15)}
# the low coefficients that JPEG keeps, by (row, column)
LOW_PLACES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3), (3, 0), (1, 3), (3, 1))
QUALITIES = tuple(range(20, 98, 3))
FREQUENCIES = 40  # of the periodicity, from 0.05 to 0.5 cycles per pixel
LAGS = 4  # of the autocorrelation, each way


def luma_chroma(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (N, h, w) and the two BT.601 chroma planes (N, 2, h, w), in grey levels of 255."""
    red, green, blue = (255 * crops).unbind(dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return luma, torch.stack([(blue - luma) * 0.564, (red - luma) * 0.713], dim=1)


class Planes(NamedTuple):
    """What the statistics read of crops (N, 3, h, w) in [0, 1]: see `luma_chroma`, `block_dct`, `table_agreement`."""

    crops: Tensor
    luma: Tensor
    chroma: Tensor
    luma_dct: Tensor
    chroma_dct: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, crops: Tensor) -> Planes:
        """Planes of crops with sides of at least 16."""
        luma, chroma = luma_chroma(crops)
        luma_dct = block_dct(luma)
        return cls(crops, luma, chroma, luma_dct, block_dct(chroma), table_agreement(luma_dct))


def _log(values: Tensor, floor: float = 0.1) -> Tensor:
    return (values + floor).log()


def _median(values: Tensor) -> Tensor:
    """The lower median over dimension 1."""
    if torch.compiler.is_exporting():  # ONNX has no median
        return values.topk((values.shape[1] + 1) // 2, dim=1, largest=False).values[:, -1]
    return values.median(dim=1).values


def _hypot(first: Tensor, second: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # nor hypot
        return (first.square() + second.square()).sqrt()
    return torch.hypot(first, second)


def _filter(planes: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every plane (..., h, w) with one kernel, valid region."""
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    out = F.conv2d(flat, kernel[None, None])
    return out.view(*planes.shape[:-2], *out.shape[-2:])


# spectrum


def spectrum_statistics(luma: Tensor) -> dict[str, Tensor]:
    """Logarithms of the shares of the spectrum's energy in 4 radial bands, and of the low half over the high half.

    A constant image is all low band.

    Source: the frequency features of FreqOrtho-SR, here on the LR image itself and under a Hann window, without which
    the jump between opposite borders fills the high bands.
    """
    height, width = luma.shape[-2:]
    window = (
        torch.hann_window(height, periodic=False, device=luma.device)[:, None]
        * torch.hann_window(width, periodic=False, device=luma.device)[None, :]
    )
    centred = luma - (luma * window).sum(dim=(-2, -1), keepdim=True) / window.sum()
    power = torch.fft.rfft2(centred * window).abs().square() / window.square().sum()
    bands = power.flatten(1) @ _band_masks(height, width, luma.device)
    bands = bands + bands.new_tensor([1e-3, 0.0, 0.0, 0.0])
    bands = (bands / bands.sum(dim=-1, keepdim=True)).clamp_min(1e-7)
    out = {name: bands[:, index].log() for index, name in enumerate(BAND_NAMES)}
    out["low_to_high"] = ((bands[:, 0] + bands[:, 1]) / (bands[:, 2] + bands[:, 3])).log()
    return out


@functools.lru_cache(maxsize=64)
def _band_masks(height: int, width: int, device: torch.device) -> Tensor:
    radius = torch.hypot(
        torch.fft.fftfreq(height, device=device)[:, None], torch.fft.rfftfreq(width, device=device)[None, :]
    )
    # a column strictly between 0 and Nyquist stands for its mirror image too
    twice = torch.full((width // 2 + 1,), 2.0, device=device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    masks = torch.stack([(radius >= low) & (radius < high) for low, high in itertools.pairwise(BAND_EDGES)])
    with torch.inference_mode(False):
        return (masks * twice).flatten(1).T


# noise


def _immerkaer(planes: Tensor) -> Tensor:
    """A sixth of the second difference each way, which is blind to smooth gradients and to edges; valid region."""
    across = planes.diff(n=2, dim=-1)
    return across.diff(n=2, dim=-2) / 6


def _block_deviation(planes: Tensor) -> Tensor:
    """Root mean square in half-overlapping 8 x 8 blocks: (N, C, h, w) -> (N, M), all channels together."""
    return F.avg_pool2d(planes.square().mean(dim=1, keepdim=True), 8, stride=4).flatten(1).sqrt()


def noise_statistics(crops: Tensor) -> dict[str, Tensor]:
    """Noise level (log grey levels) in the flattest tenth of the blocks, by Immerkaer's difference of two Laplacians.

    The mean of R, G and B makes gray and coloured noise of one sigma count the same. `noise_half` is taken at half
    resolution, where noise that was resized or compressed still shows; `noise_next` is the correlation of neighbours in
    the filtered image, which tells noise of single pixels from noise that was spread.

    Source: J. Immerkaer, Fast noise variance estimation, 1996 (the mask); the flat-block quantile replaces its mean.
    """
    full = 255 * _immerkaer(crops)
    half = 255 * _immerkaer(F.avg_pool2d(F.pad(crops, (0, 4, 0, 4), mode="replicate"), 2))
    # the mask is linear: luma and chroma of the residual are those of the image, filtered
    luma, chroma = luma_chroma(full / 255)
    blocks, halved, coloured = _block_deviation(full), _block_deviation(half), _block_deviation(chroma)
    power = luma.square().mean(dim=(1, 2)) + 0.01
    across = (luma[..., 1:] * luma[..., :-1]).mean(dim=(1, 2))
    down = (luma[..., 1:, :] * luma[..., :-1, :]).mean(dim=(1, 2))
    return {
        "noise": _log(blocks.quantile(0.1, dim=1)),
        "noise_half": _log(halved.quantile(0.1, dim=1)),
        "noise_median": _log(_median(luma[:, ::2, ::2].abs().flatten(1))),
        "noise_blocks": _log(_median(blocks)),
        "noise_chroma": _log(coloured.quantile(0.1, dim=1)),
        "noise_chroma_blocks": _log(_median(coloured)),
        "noise_next": (across + down) / (2 * power),
    }


# blocks


@functools.lru_cache(maxsize=8)
def _dct_matrix(device: torch.device) -> Tensor:
    return dct_matrix().float().to(device)


def block_dct(planes: Tensor) -> Tensor:
    """Orthonormal 8 x 8 DCT of whole blocks counted from the upper left corner: (..., h, w) -> (..., M, 8, 8)."""
    height, width = planes.shape[-2:]
    blocks = rearrange(planes[..., : height // 8 * 8, : width // 8 * 8], "... (a u) (b v) -> ... (a b) u v", u=8, v=8)
    matrix = _dct_matrix(planes.device)
    return matrix @ blocks @ matrix.T


def table_agreement(coefficients: Tensor) -> Tensor:
    """How well the standard table of each of `QUALITIES` explains DCT coefficients (N, M, 8, 8): (N, qualities).

    In a JPEG that was not resized since, every coefficient is a multiple of its step, so the mean cosine of
    2 pi c / step over the coefficients that are not quantised to zero is near 1 at the right quality.
    """
    chosen = torch.stack([coefficients[..., row, column] for row, column in LOW_PLACES], dim=-1)
    qualities = chosen.new_tensor(QUALITIES)
    factor = torch.where(qualities < 50, 50 / qualities, 2 - qualities / 50)
    table = chosen.new_tensor([LUMA_TABLE[row][column] for row, column in LOW_PLACES])
    steps = (table * factor[:, None]).round().clamp_min(1)
    value = chosen[:, None]  # (N, 1, M, places) against steps (qualities, 1, places)
    step = steps[:, None]
    usable = (value.abs() > 0.6 * step) & (step >= 3)
    return (torch.cos(2 * math.pi * value / step) * usable).sum(dim=(-2, -1)) / (usable.sum(dim=(-2, -1)) + 8)


def _table_fit(agreement: Tensor) -> Tensor:
    """The quality (0 to 100) by what `table_agreement` gives; 100 where no table fits.

    A divisor of the steps does as well: the lowest quality that comes close to the best is taken.
    """
    best = agreement.max(dim=-1).values
    first = (agreement > 0.6 * best[:, None]).float().argmax(dim=-1)
    qualities = agreement.new_tensor(QUALITIES)
    return torch.where(best > 0.35, qualities[first], torch.full_like(best, 100.0))


def _grid_jump(luma: Tensor) -> tuple[Tensor, Tensor]:
    """The mean absolute step across the borders of 8-pixel columns, and across all others."""
    steps = (luma[..., 1:] - luma[..., :-1]).abs().mean(dim=-2)
    on_grid = torch.arange(steps.shape[-1], device=steps.device) % 8 == 7
    return steps[:, on_grid].mean(dim=-1), steps[:, ~on_grid].mean(dim=-1)


@functools.lru_cache(maxsize=8)
def _range_masks(device: torch.device) -> Tensor:
    order = torch.arange(8)[:, None] + torch.arange(8)[None, :]
    masks = torch.stack([((order >= low) & (order < high)).float() for low, high in DCT_RANGES.values()])
    return (masks / masks.sum(dim=(1, 2), keepdim=True)).flatten(1).T.to(device)  # (64, ranges)


def block_statistics(planes: Planes) -> dict[str, Tensor]:
    """Traces of a grid of blocks, and the energy of the blocks' DCT coefficients in flat, usual and busy blocks.

    `block` compares the steps across the 8-pixel grid with the others (log ratio, 0 without JPEG). `block_zeros`
    compares how many coefficients are not zero on the grid and half a block away from it. `table` is 100 minus the
    quality of the table that fits (0 where none does).
    """
    luma, aligned = planes.luma, planes.luma_dct
    shifted = block_dct(luma[..., 4:-4, 4:-4])
    (here, beside), (here_down, beside_down) = _grid_jump(luma), _grid_jump(luma.transpose(-2, -1))
    out = {"block": _log(here + here_down) - _log(beside + beside_down)}
    for name, threshold in (("block_zeros", 1.5), ("block_zeros_fine", 0.5)):
        on, off = (
            (part.flatten(-2)[..., 1:].abs() > threshold).float().mean(dim=(-2, -1)) for part in (aligned, shifted)
        )
        out[name] = _log(off, 0.01) - _log(on, 0.01)
    out["table"] = 100 - _table_fit(planes.agreement)
    masks = _range_masks(luma.device)
    energy = (aligned.flatten(-2).square() @ masks).sqrt()
    quantiles = energy.quantile(energy.new_tensor([0.1, 0.5, 0.9]), dim=1)
    colour = _median((planes.chroma_dct.square().mean(dim=1).flatten(-2) @ masks).sqrt())
    for index, name in enumerate(DCT_RANGES):
        for part, value in zip(("flat", "usual", "busy"), quantiles, strict=False):
            out[f"dct_{name}_{part}"] = _log(value[:, index])
        out[f"chroma_{name}"] = _log(colour[:, index])
    return out


# blur


def contrast(luma: Tensor) -> Tensor:
    """Log standard deviation of luma (N, h, w), from every second pixel each way."""
    return _log(luma[:, ::2, ::2].flatten(1).std(dim=1))


def blur_statistics(luma: Tensor) -> dict[str, Tensor]:
    """How wide edges are, whatever their height.

    `edge_ratio` is the gradient at strong edges over the gradient there after one more blur of sigma 1: for a step
    edge of width sigma it is sqrt(1 + 1/sigma^2), whatever the step's height. The others are the mean
    loss of gradient under the same blur, neighbour correlations of the gradient, and its tail.

    Source: S. Zhuo, T. Sim, Defocus map estimation from a single image, 2011 (the ratio); the loss of gradient
    follows F. Crete et al., The blur effect, 2007.
    """
    sobel = luma.new_tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 8
    kernel = (-0.5 * torch.arange(-2.0, 3.0, device=luma.device).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(luma[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
    blurred = _filter(_filter(padded, kernel[None, :]), kernel[:, None])
    down, across = _filter(luma, sobel), _filter(luma, sobel.T)
    before = _hypot(down, across)
    after = _hypot(_filter(blurred, sobel), _filter(blurred, sobel.T))
    inner = before[:, 1:-1, 1:-1]
    # the ridge of an edge: the largest gradient along its own direction, to the nearest axis
    level = (across.abs() >= down.abs())[:, 1:-1, 1:-1]
    beside = inner >= torch.maximum(before[:, 1:-1, 2:], before[:, 1:-1, :-2])
    above = inner >= torch.maximum(before[:, 2:, 1:-1], before[:, :-2, 1:-1])
    peak = (level & beside) | (~level & above)
    sample = before[:, ::2, ::2].flatten(1)
    usual, strongest, top = sample.quantile(sample.new_tensor([0.7, 0.9, 0.98]), dim=1)
    out = {}
    spread = contrast(luma)
    # the floors let a flat area count as neither sharp nor blurred
    ratio = ((before + 0.3) / (after + 0.3))[:, 1:-1, 1:-1]
    for name, bound in (("edge_ratio", usual), ("edge_ratio_strong", strongest)):
        strong = peak & (inner >= bound[:, None, None])
        out[name] = (ratio * strong).sum(dim=(1, 2)) / strong.sum(dim=(1, 2)).clamp_min(1)
    out["gradient_loss"] = _log(after.mean(dim=(1, 2))) - _log(before.mean(dim=(1, 2)))
    out["gradient_top"] = _log(top) - spread
    out["contrast"] = spread
    step = luma[..., 1:] - luma[..., :-1]
    power = step.square().mean(dim=(1, 2)) + 0.01
    out["gradient_next"] = (step[..., 1:] * step[..., :-1]).mean(dim=(1, 2)) / power
    out["gradient_second"] = (step[..., 2:] * step[..., :-2]).mean(dim=(1, 2)) / power
    out["gradient_tail"] = (step.square().square().mean(dim=(1, 2)) + 1e-4).log() - 2 * power.log()
    return out


def image_statistics(planes: Planes) -> dict[str, Tensor]:
    """All statistics of N crops; each (N,)."""
    return {
        **spectrum_statistics(planes.luma),
        **noise_statistics(planes.crops),
        **block_statistics(planes),
        **blur_statistics(planes.luma),
    }


def dct_profile(planes: Planes) -> Tensor:
    """Log energy of every AC coefficient (N, 189): luma of all blocks, of the flattest quarter, and chroma."""
    power = planes.luma_dct.square().flatten(-2)[..., 1:]  # (N, M, 63)
    busy = power.sum(dim=-1)
    flat = (busy <= busy.quantile(0.25, dim=1, keepdim=True)).to(power.dtype)
    flat_power = torch.einsum("nm,nmf->nf", flat, power) / flat.sum(dim=1, keepdim=True).clamp_min(1)
    colour = planes.chroma_dct.square().flatten(-2)[..., 1:].mean(dim=(1, 2))
    return torch.cat([power.mean(dim=1), flat_power, colour], dim=1).add(0.01).log()


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
    for order in (1, 2):
        power = torch.zeros(())
        for plane in (luma, luma.transpose(-2, -1)):
            line = (plane.diff(dim=-1, n=order).abs() + 1).log().mean(dim=-2)
            smooth = F.avg_pool1d(F.pad(line[:, None], (6, 6), mode="reflect"), 13, stride=1)[:, 0]
            basis, energy = _fourier(line.shape[-1], line.device)
            parts = (line - smooth) @ basis
            power = parts.square().unflatten(-1, (2, FREQUENCIES)).sum(dim=1) / energy + power.to(luma.device)
        logarithm = (power + 1e-7).log()
        found.append(logarithm - _median(logarithm)[:, None])
    return torch.cat(found, dim=1)


@functools.lru_cache(maxsize=64)
def _fourier(length: int, device: torch.device) -> tuple[Tensor, float]:
    window = torch.hann_window(length, periodic=False, dtype=torch.float64)
    frequency = torch.linspace(0.05, 0.5, FREQUENCIES, dtype=torch.float64)
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] * frequency
    basis = torch.cat([phase.cos(), phase.sin()], dim=1) * window[:, None]
    with torch.inference_mode(False):
        return basis.float().to(device), float(window.square().sum())


def noise_shape(luma: Tensor, chroma: Tensor) -> Tensor:
    """Autocorrelation of what Immerkaer's mask leaves in the flatter part of a crop, in luma and both chroma planes.

    White noise, noise that was enlarged or filtered since, and noise that JPEG took from the fine coefficients differ
    in it, whatever their level. Per plane LAGS^2 - 1 correlations at lags 0 to LAGS - 1 each way, and the log power:
    (N, 3 LAGS^2).

    Args:
        luma: (N, h, w) in grey levels of 255.
        chroma: (N, 2, h, w).
    """
    planes = torch.cat([luma[:, None], chroma], dim=1)
    residual = _immerkaer(F.pad(planes, (1, 1, 1, 1), mode="replicate"))  # (N, 3, h, w)
    # sums of 9 x 9 neighbours, exactly zero where all are
    activity = F.pad(residual.abs(), (4, 4, 4, 4)).unfold(-1, 9, 1).sum(-1).unfold(-2, 9, 1).sum(-1)
    # every second pixel each way is enough for the bound, and a sort is dear
    bound = activity[..., ::2, ::2].flatten(2).quantile(0.4, dim=2)
    flat = (activity <= bound[..., None, None]).to(residual.dtype)
    height, width = residual.shape[-2:]
    chosen = residual * flat

    def correlation(down: int, right: int) -> Tensor:
        there = residual[..., : height - down, : width - right]
        weight = flat[..., down:, right:].sum(dim=(-2, -1)).clamp_min(1)
        return (chosen[..., down:, right:] * there).sum(dim=(-2, -1)) / weight

    power = correlation(0, 0) + 0.01
    lags = [(down, right) for down in range(LAGS) for right in range(LAGS) if (down, right) != (0, 0)]
    shape = [correlation(*lag) / power for lag in lags]
    return torch.stack([*shape, power.log()], dim=-1).flatten(1)


def image_traces(planes: Planes) -> Tensor:
    """All traces of N crops: (N, T)."""
    return torch.cat([periodicity(planes.luma), noise_shape(planes.luma, planes.chroma), planes.agreement], dim=1)
