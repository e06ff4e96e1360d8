"""Cut an image into overlapping tiles, and blend what was made of them without a seam.

Shapes: images (B, C, H, W), tiles (B, C, h, w), weights (h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from morsr.errors import ConfigError, InputError

FEATHER_SIGMA = 0.12
"""Deviation of the feather as a share of the tile's side. Where tiles overlap by a quarter, the hand-over from one to
the next is then smooth, and a tile has lost all but 0.2 % of its say where it ends."""


class Window(NamedTuple):
    """A tile's place in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    def cut(self, images: Tensor) -> Tensor:
        """The window's part (B, C, height, width) of images (B, C, H, W); a view."""
        return images[..., self.rows, self.columns]


def tile_starts(length: int, tile: int, *, overlap: int, multiple: int = 1) -> list[int]:
    """Where tiles begin along one axis: as few as the overlap allows, spread evenly.

    Args:
        length: pixels to cover, a multiple of `multiple`.
        tile: side of a tile, a multiple of `multiple`; an image shorter than that is covered by one tile of its length.
        overlap: smallest overlap of neighbours, a multiple of `multiple` below `tile`.
        multiple: every start is a multiple of this, so that tiles lie on the network's grid.

    Raises:
        ConfigError: a size that is not positive or not on the grid.
    """
    for name, value, lowest in (("length", length, 1), ("tile", tile, 1), ("overlap", overlap, 0)):
        if value < lowest or value % multiple:
            raise ConfigError(f"tiling: expected {name} of at least {lowest} and a multiple of {multiple}, got {value}")
    if overlap >= tile:
        raise ConfigError(f"tiling: expected an overlap below the tile of {tile}, got {overlap}")
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    cells = (length - tile) // multiple
    return [index * cells // (count - 1) * multiple for index in range(count)]


def tile_windows(height: int, width: int, tile: int, *, overlap: int, multiple: int = 1) -> list[Window]:
    """Windows that cover an image of any proportions, row by row; see `tile_starts` for the arguments."""
    rows = tile_starts(height, tile, overlap=overlap, multiple=multiple)
    columns = tile_starts(width, tile, overlap=overlap, multiple=multiple)
    return [Window(top, left, min(tile, height), min(tile, width)) for top in rows for left in columns]


def feather_weights(
    height: int, width: int, *, sigma: float = FEATHER_SIGMA, device: torch.device | None = None
) -> Tensor:
    """Gaussian weights (height, width) of a tile: 1 in its middle, small but never 0 at its border.

    Args:
        height, width: the tile's size in pixels.
        sigma: deviation as a share of each side.
    """
    axes = []
    for size in (height, width):
        position = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size - 0.5
        axes.append(torch.exp(-0.5 * (position / sigma).square()))
    return axes[0][:, None] * axes[1][None, :]


def blend_bands(tiles: Iterable[tuple[Window, Tensor]], height: int, width: int, *, rows: int = 64) -> Iterator[Tensor]:
    """Blend tiles into bands of finished rows, holding no more than one row of tiles.

    Args:
        tiles: windows, row by row from the top as `tile_windows` gives them, each with its tile (B, C, h, w).
        height, width: size of the whole image; the windows must cover it.
        rows: largest height of a band.

    Yields:
        (B, C, at most `rows`, width) float32, from the top; together `height` rows.

    Raises:
        InputError: a tile whose size is not its window's, or windows that leave pixels uncovered.
    """
    total, weight = torch.zeros(0), torch.zeros(0)
    top = end = 0
    for window, tile in tiles:
        if tile.shape[-2:] != (window.height, window.width):
            raise InputError(f"tiling: a tile of {tuple(tile.shape[-2:])} came for the window {tuple(window)}")
        if end == 0:
            total = tile.new_zeros((*tile.shape[:-2], window.height, width), dtype=torch.float32)
            weight = total.new_zeros((window.height, width))
        if window.top > top:
            done = window.top - top
            yield from _finished(total[..., :done, :], weight[:done], rows)
            # The rows that go on move up within one buffer; a new one per row of tiles would double the memory.
            for buffer in (total, weight):
                kept = buffer.shape[-2] - done
                buffer[..., :kept, :] = buffer[..., done:, :].clone()
                buffer[..., kept:, :] = 0
            top = window.top
        feather = feather_weights(window.height, window.width, device=tile.device)
        inside = slice(window.top - top, window.top - top + window.height)
        total[..., inside, window.columns] += tile.float() * feather
        weight[inside, window.columns] += feather
        end = window.top + window.height
    if end != height:
        raise InputError(f"tiling: the tiles do not cover an image of {height} rows")
    yield from _finished(total[..., : end - top, :], weight[: end - top], rows)


def _finished(total: Tensor, weight: Tensor, rows: int) -> Iterator[Tensor]:
    for sums, weights in zip(total.split(rows, dim=-2), weight.split(rows, dim=-2), strict=True):
        if not bool((weights > 0).all()):
            raise InputError("tiling: the tiles leave pixels uncovered")
        yield sums / weights


def blend_tiles(tiles: Iterable[tuple[Window, Tensor]], height: int, width: int) -> Tensor:
    """Blend tiles into one image (B, C, height, width) in float32; see `blend_bands`."""
    return torch.cat(list(blend_bands(tiles, height, width)), dim=-2)


def apply_tiled(
    function: Callable[[Tensor], Tensor], images: Tensor, tile: int, *, overlap: int, multiple: int = 1
) -> Tensor:
    """Run a function on overlapping tiles of images and blend the results; for the identity it is the identity.

    Args:
        function: maps (B, C, h, w) to (B, C', h, w).
        images: (B, C, H, W) with H and W multiples of `multiple`.
        tile, overlap, multiple: see `tile_starts`.

    Returns:
        (B, C', H, W) float32.
    """
    height, width = images.shape[-2:]
    windows = tile_windows(height, width, tile, overlap=overlap, multiple=multiple)
    return blend_tiles(((window, function(window.cut(images))) for window in windows), height, width)
