"""Cut an image into overlapping tiles, and blend what was made of them without a seam.

Shapes: images (B, C, H, W), tiles (B, C, h, w), weights (h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


def feather_axis(size: int, *, sigma: float = FEATHER_SIGMA, device: torch.device | None = None) -> Tensor:
    """Gaussian weights (size,) of a tile along one axis: 1 in its middle, small but never 0 at its border.

    Args:
        size: the tile's side in pixels.
        sigma: deviation as a share of the side.
    """
    position = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size - 0.5
    return torch.exp(-0.5 * (position / sigma).square())


def feather_weights(
    height: int, width: int, *, sigma: float = FEATHER_SIGMA, device: torch.device | None = None
) -> Tensor:
    """Weights (height, width) of a tile, the product of `feather_axis` along both sides."""
    rows, columns = (feather_axis(size, sigma=sigma, device=device) for size in (height, width))
    return rows[:, None] * columns[None, :]


class RowBuffer(Protocol):
    """Keeps the sums of tiles (B, C, rows, W) until their rows are finished; its rows are counted from the image's."""

    def add(self, window: Window, values: Tensor) -> None:
        """Add values (B, C, h, w) at a window."""

    def take(self, top: int, rows: int) -> Tensor:
        """Give out rows (B, C, rows, W), the topmost that are kept, and forget them."""


class MemoryRows:
    """A `RowBuffer` in memory, on the device of the tiles.

    Args:
        width: of the image in pixels.
    """

    def __init__(self, width: int) -> None:
        self._width, self._top = width, 0
        self._sums: Tensor | None = None

    def add(self, window: Window, values: Tensor) -> None:
        end = window.top + window.height - self._top
        if self._sums is None:
            self._sums = values.new_zeros((*values.shape[:-2], end, self._width), dtype=torch.float32)
        elif (missing := end - self._sums.shape[-2]) > 0:
            more = self._sums.new_zeros((*self._sums.shape[:-2], missing, self._width))
            self._sums = torch.cat([self._sums, more], dim=-2)
        inside = slice(window.top - self._top, end)
        self._sums[..., inside, window.columns] += values

    def take(self, top: int, rows: int) -> Tensor:
        assert self._sums is not None
        assert top == self._top
        taken, self._sums = self._sums[..., :rows, :], self._sums[..., rows:, :]
        self._top += rows
        return taken


@dataclass
class _TileRow:
    """The tiles of one height: where they stand, and the sum of their weights along the columns."""

    top: int
    height: int
    columns: Tensor

    def weights(self, top: int, rows: int) -> Tensor:
        """Its share of the weights (rows, W) of the rows from `top` on."""
        weights = feather_axis(self.height, device=self.columns.device)
        first, last = max(top, self.top), min(top + rows, self.top + self.height)
        result = torch.zeros(rows, device=weights.device)
        if first < last:
            result[first - top : last - top] = weights[first - self.top : last - self.top]
        return result[:, None] * self.columns[None, :]


def blend_bands(
    tiles: Iterable[tuple[Window, Tensor]],
    height: int,
    width: int,
    *,
    rows: int = 64,
    buffer: RowBuffer | None = None,
) -> Iterator[Tensor]:
    """Blend tiles into bands of finished rows, keeping no more than one row of tiles.

    Args:
        tiles: windows, row by row from the top as `tile_windows` gives them, each with its tile (B, C, h, w).
        height, width: size of the whole image; the windows must cover it.
        rows: largest height of a band.
        buffer: where unfinished rows are kept; default in memory.

    Yields:
        (B, C, at most `rows`, width) float32, from the top; together `height` rows.

    Raises:
        InputError: a tile whose size is not its window's, or windows that leave pixels uncovered.
    """
    buffer = MemoryRows(width) if buffer is None else buffer
    open_rows: list[_TileRow] = []
    done = end = 0
    for window, tile in tiles:
        if tile.shape[-2:] != (window.height, window.width):
            raise InputError(f"tiling: a tile of {tuple(tile.shape[-2:])} came for the window {tuple(window)}")
        if not open_rows or window.top > open_rows[-1].top:
            yield from _finished(buffer, open_rows, done, window.top, rows)
            done = window.top
            open_rows = [row for row in open_rows if row.top + row.height > done]
            open_rows.append(_TileRow(window.top, window.height, torch.zeros(width, device=tile.device)))
        down, across = (feather_axis(length, device=tile.device) for length in (window.height, window.width))
        buffer.add(window, tile.float() * down[:, None] * across)
        open_rows[-1].columns[window.columns] += across
        end = max(end, window.top + window.height)
        del tile
    if end != height:
        raise InputError(f"tiling: the tiles do not cover an image of {height} rows")
    yield from _finished(buffer, open_rows, done, height, rows)


def _finished(buffer: RowBuffer, tile_rows: list[_TileRow], top: int, end: int, rows: int) -> Iterator[Tensor]:
    for start in range(top, end, rows):
        count = min(rows, end - start)
        weights = sum((row.weights(start, count) for row in tile_rows), torch.zeros(()))
        if not bool((weights > 0).all()):
            raise InputError("tiling: the tiles leave pixels uncovered")
        yield buffer.take(start, count) / weights


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
