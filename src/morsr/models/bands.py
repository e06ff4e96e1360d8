"""Colour correction of an image that exists only as bands of rows, equal to the correction of the whole image."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from morsr.functional.color import ChannelStatistics, adain_apply, wavelet_halo, wavelet_low
from morsr.functional.resample import bicubic_window

Bands = Callable[[], Generator[Tensor, None, None]]
"""Goes through an image's bands (B, C, rows, W) from the top; each call begins again."""

Rows = Callable[[int, int], Tensor]
"""Rows top … top + height of an image, (B, C, height, W)."""

_REFERENCE_ROWS = 256


def upsampled_rows(lr: Tensor, size: tuple[int, int]) -> Rows:
    """Rows of the bicubic enlargement of images (B, C, h, w) to `size`, clamped to [0, 1], computed when asked for."""
    return lambda top, height: bicubic_window(lr, size, top=top, height=height, width=size[1]).clamp(0, 1)


def color_bands(
    bands: Bands, reference: Rows, size: tuple[int, int], method: str, strength: float, *, hold: bool = True
) -> Bands:
    """Correct the colours of bands and clamp them to [0, 1].

    Args:
        bands: the restored image.
        reference: rows of the image whose colours are wanted.
        size: height and width of the whole image.
        method: "wavelet"; "adain", which needs the statistics of the whole image first; or "none".
        strength: 0 to 1.
        hold: whether "adain" may hold the whole image; otherwise it goes through the bands twice.
    """
    if method == "none" or strength == 0:
        return lambda: (rows.clamp(0, 1) for rows in bands())
    if method == "wavelet":
        return lambda: _wavelet(bands(), reference, size[0], strength)
    return lambda: _adain(bands, reference, size[0], strength, hold)


def _wavelet(bands: Iterator[Tensor], reference: Rows, height: int, strength: float) -> Generator[Tensor, None, None]:
    """Hold back the rows whose low frequencies depend on rows that are still to come.

    Only their difference to the reference is held, and the rows are had from it again: half the memory.
    """
    halo = wavelet_halo()
    difference: Tensor | None = None
    done = end = above = 0  # rows given out, rows received, rows of `difference` above `done`
    for rows in bands:
        new = reference(end, rows.shape[-2]) - rows
        difference = new if difference is None else torch.cat([difference, new], dim=-2)
        end += rows.shape[-2]
        ready = (end if end == height else end - halo) - done
        del rows, new
        if ready > 0:
            low = wavelet_low(difference)[..., above : above + ready, :]
            finished = reference(done, ready).sub_(difference[..., above : above + ready, :])
            finished.add_(low, alpha=strength).clamp_(0, 1)
            keep = min(halo, above + ready)
            difference = difference[..., above + ready - keep :, :].clone()
            done, above = done + ready, keep
            # What is finished may not outlive its turn: the next band can be a whole row of tiles away.
            del low
            yield finished
            del finished


def _adain(bands: Bands, reference: Rows, height: int, strength: float, hold: bool) -> Generator[Tensor, None, None]:
    tops = range(0, height, _REFERENCE_ROWS)
    style = _statistics(reference(top, min(_REFERENCE_ROWS, height - top)) for top in tops)
    held = list(bands()) if hold else None
    content = _statistics(iter(held) if held is not None else bands())
    for rows in held if held is not None else bands():
        moved = [ChannelStatistics(*(value.to(rows) for value in statistics)) for statistics in (content, style)]
        yield adain_apply(rows, moved[0], moved[1], strength=strength).clamp(0, 1)


def _statistics(bands: Iterator[Tensor]) -> ChannelStatistics:
    """Mean and deviation of each channel over all bands, by the merging formula of Chan et al. 1979."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for rows in bands:
        number = rows.shape[-2] * rows.shape[-1]
        band_mean = rows.mean(dim=(-2, -1), keepdim=True)
        band_square = (rows - band_mean).square().mean(dim=(-2, -1), keepdim=True).cpu().double() * number
        shift = band_mean.cpu().double() - mean
        total = count + number
        mean = mean + shift * (number / total)
        square = square + band_square + shift.square() * (count * number / total)
        count = total
    return ChannelStatistics(mean, (square / count).sqrt())
