"""Cut an enlarged image into overlapping tiles, run the networks on each, and add the results up without a seam.

The weight of a tile is the product of one vector per axis, and the weights of all tiles sum to 1 at every pixel. So
tiles are simply added to a canvas, and a network that changes nothing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.errors import WeightsError
from morsr.functional.color import WAVELET_HALO, ChannelStatistics, adain_apply, luma, wavelet_low
from morsr.functional.resample import bicubic_window, unit_range
from morsr.restoring.settings import Settings

if TYPE_CHECKING:
    from morsr.models.generator import OneStepGenerator

AUTO_LATENTS = 128  # side of an automatic tile in latent pixels: twice the side that Stable Diffusion was trained at
SINGLE_PASS = 1.5  # an image up to this many automatic tiles a side goes through in one pass, if memory allows
OVERLAP = 0.25  # share of a tile that overlaps its neighbour
MEMORY_SHARE = 0.5  # share of the free memory that a pass may be expected to use
FEATHER = 0.12  # standard deviation of a tile's weights as a share of its side
PALE = 8.5 / 255  # largest difference between the channels of an image that counts as gray with a tint
ROW_PIXELS = 1 << 19  # pixels of the rows that are colour-corrected at once; at least 64 rows


class Window(NamedTuple):
    """The place of a tile in pixels of the enlarged image, and its weights (height,) and (width,)."""

    top: int
    left: int
    down: Tensor
    across: Tensor

    @property
    def height(self) -> int:
        return len(self.down)

    @property
    def width(self) -> int:
        return len(self.across)

    def add(self, canvas: Tensor, tile: Tensor, shrink: int = 1) -> None:
        """Add a tile (B, C, height, width), shrunk, to a canvas (B, C, H, W); what reaches beyond it is dropped."""
        weighted = tile.float() * self.down.to(tile.device)[:, None] * self.across.to(tile.device)
        if shrink > 1:
            weighted = F.avg_pool2d(weighted, shrink)
        top, left = self.top // shrink, self.left // shrink
        place = canvas[..., top : top + weighted.shape[-2], left : left + weighted.shape[-1]]
        place += weighted[..., : place.shape[-2], : place.shape[-1]].to(canvas.device)


def tile_starts(length: int, tile: int, *, overlap: int, multiple: int = 1) -> list[int]:
    """Where tiles begin along one axis: as few as the overlap allows, spread evenly.

    Args:
        length: pixels to cover, a multiple of `multiple`.
        tile: side of a tile, a multiple of `multiple`; a shorter image is covered by one tile of its length.
        overlap: smallest overlap of neighbours, a multiple of `multiple` below `tile`.
        multiple: every start is a multiple of this, so that tiles lie on the network's grid.
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    cells = (length - tile) // multiple
    return [index * cells // (count - 1) * multiple for index in range(count)]


def tile_weights(length: int, tile: int, starts: list[int]) -> list[Tensor]:
    """Gaussian weights of each tile along one axis, divided by the sum over all tiles at each pixel."""
    side = min(length, tile)
    feather = (-0.5 * (((torch.arange(side) + 0.5) / side - 0.5) / FEATHER).square()).exp()
    total = torch.zeros(length)
    for start in starts:
        total[start : start + side] += feather
    return [feather / total[start : start + side] for start in starts]


def tiling(size: tuple[int, int], side: int, multiple: int) -> list[Window]:
    """Tiles of at most `side` pixels a side, row by row, that cover an image padded to the networks' grid.

    Args:
        size: height and width of the enlarged image.
        side: of a tile; rounded up to the grid, and to two steps of it, since less leaves no room for an overlap.
        multiple: sides that the networks take.
    """
    side = max(math.ceil(side / multiple), 2) * multiple
    overlap = max(multiple, round(side * OVERLAP / multiple) * multiple)
    axes = []
    for length in size:
        length = math.ceil(length / multiple) * multiple
        starts = tile_starts(length, side, overlap=overlap, multiple=multiple)
        axes.append(list(zip(starts, tile_weights(length, side, starts), strict=True)))
    return [Window(top, left, down, across) for top, down in axes[0] for left, across in axes[1]]


def tile_side(generator: OneStepGenerator, size: tuple[int, int], tile: int | str | None, free: int) -> int:
    """Side of the tiles of an enlarged image (height, width) in pixels; `tile` as in `Settings`, `free` in bytes.

    The decoder's last blocks need the most: about ten feature maps of twice the outermost width at once, in float32.
    """
    if isinstance(tile, int):
        return tile
    if tile is None:
        return max(size)
    config: Any = getattr(getattr(generator.base, "vae", None), "config", None)
    widths = getattr(config, "decoder_block_out_channels", None) or getattr(config, "block_out_channels", None)
    affordable = int(free * MEMORY_SHARE / (80 * (min(widths) if widths else 64)))
    wanted = AUTO_LATENTS * generator.base.latent_factor
    if size[0] * size[1] <= min(affordable, (SINGLE_PASS * wanted) ** 2):
        return max(size)
    return min(wanted, math.isqrt(affordable)) // generator.base.multiple * generator.base.multiple


def run_pass(generator: OneStepGenerator, enlarged: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode, denoise and decode one tile; once more in float32 when NaN comes out of half precision.

    Args:
        generator: with a routing.
        enlarged: (B, 3, h, w) in [0, 1], sides on the grid; so is the result, in float32, not clamped.
        dtype: precision of the networks.

    Raises:
        WeightsError: NaN or infinity even in float32.
    """
    for precision in dict.fromkeys((dtype, torch.float32)):
        with torch.autocast(enlarged.device.type, dtype=precision, enabled=precision != torch.float32):
            result = generator.decode(generator.denoise(generator.encode(enlarged))).float()
        if bool(torch.isfinite(result).all()):
            return result
    raise WeightsError("the networks give NaN or infinity for this image even in float32; the weights may be damaged")


def enlarged_rows(lr: Tensor, size: tuple[int, int], top: int, end: int) -> Tensor:
    """Rows top … end of the bicubic enlargement of images (B, C, h, w) to `size`, clamped to [0, 1]."""
    return bicubic_window(lr, size, top=top, height=end - top, width=size[1]).clamp(0, 1)


def finished_rows(image: Tensor, lr: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Rows of restored images from the top, with the colours of the input; of a pale one with the input's chroma.

    Args:
        image: (B, 3, H, W), the networks' output, on the processor.
        lr: (B, 3, h, w), the input.
        settings: `color` and `color_strength` count.

    Yields:
        (B, 3, rows, W) in [0, 1].
    """
    size, lr = (image.shape[-2], image.shape[-1]), lr.cpu()
    rows_at_once = max(64, ROW_PIXELS // size[1])
    parts = [(top, min(top + rows_at_once, size[0])) for top in range(0, size[0], rows_at_once)]
    if settings.color == "adain":
        content = _statistics(image[..., top:end, :] for top, end in parts)
        style = _statistics(enlarged_rows(lr, size, top, end) for top, end in parts)
    pale = is_pale(lr)
    for top, end in parts:
        rows = image[..., top:end, :]
        if settings.color == "wavelet":
            first, last = max(0, top - WAVELET_HALO), min(size[0], end + WAVELET_HALO)
            low = wavelet_low(enlarged_rows(lr, size, first, last) - image[..., first:last, :])
            rows = rows + settings.color_strength * low[..., top - first : end - first, :]
        elif settings.color == "adain":
            rows = adain_apply(rows, content, style, strength=settings.color_strength)
        rows = rows.clamp(0, 1)
        if pale.any():
            source = enlarged_rows(lr, size, top, end)
            rows = torch.where(pale, (luma(rows) + (source - luma(source))).clamp(0, 1), rows)
        yield rows


def is_pale(lr: Tensor) -> Tensor:
    """Whether images (B, 3, h, w) are gray or almost so, as (B, 1, 1, 1): what tint they have is the input's."""
    parts = (unit_range(part) for part in lr.split(256, dim=-2))
    spread = torch.stack([(part.amax(dim=1) - part.amin(dim=1)).flatten(1).amax(dim=1) for part in parts]).amax(dim=0)
    return (spread <= PALE).view(-1, 1, 1, 1)


def _statistics(parts: Iterator[Tensor]) -> ChannelStatistics:
    """Mean and standard deviation of each channel over all parts of an image."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.double()
        count += values[0, 0].numel()
        total = total + values.sum(dim=(-2, -1), keepdim=True)
        square = square + values.square().sum(dim=(-2, -1), keepdim=True)
    mean = total / count
    return ChannelStatistics(mean.float(), (square / count - mean.square()).clamp(min=0).sqrt().float())
