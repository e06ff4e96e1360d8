"""How an image is divided into passes of the generator, and one pass with its two safety nets: memory and NaN."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from morsr.errors import InputError, WeightsError
from morsr.functional.tiling import RowBuffer, Window, apply_tiled, blend_bands, tile_windows
from morsr.models.memory import free_memory, is_out_of_memory, release_memory
from morsr.models.vae_tiles import vae_tiles

if TYPE_CHECKING:
    from morsr.models.bands import Bands
    from morsr.models.generator import OneStepGenerator

AUTO_LATENTS = 128
"""Side of an automatic tile in latent pixels: twice the side that Stable Diffusion was trained at."""

SINGLE_PASS = 1.5
"""An image up to this many automatic tile sides a side goes through in one pass, if memory allows."""

OVERLAP = 0.25
"""Share of a tile that overlaps its neighbour."""

MEMORY_SHARE = 0.5
"""Share of the free memory that a pass may be expected to use."""


SMALLEST_VAE_TILE = 32
"""Least side in latent pixels of the autoencoder's tiles: below it the margins cost more than the cores."""

BAND_PIXELS = 1 << 17
"""Pixels of a band of finished rows, about; at least 16 rows."""

OUTPUT_BYTES = 40
"""Main memory per pixel of an output that is not streamed: its bands, the whole, and the samples made of it."""


@dataclass
class TilePlan:
    """Windows of the enlarged image, padded to the networks' grid.

    Attributes:
        windows: row by row; they may reach beyond the image on the right and below.
        height, width: the padded size, multiples of `multiple`.
        multiple: sides that the networks take.
        pixels_at_once: pixels of a pass that the memory is expected to hold.
        largest: side of the largest pass; shrinks when memory runs out.
        vae_side: side in latent pixels of the autoencoder's tiles inside a pass, None for a whole; shrinks first, since
            its tiles give what the whole would give.
    """

    windows: list[Window]
    height: int
    width: int
    multiple: int
    pixels_at_once: int
    largest: int = field(default=2**31)
    vae_side: int | None = None

    @property
    def single(self) -> bool:
        """Whether one window covers the whole image."""
        return len(self.windows) == 1

    def blended(
        self,
        tiles: Callable[[], Iterator[tuple[Window, Tensor]]],
        size: tuple[int, int],
        buffer: Callable[[], RowBuffer] | None = None,
    ) -> Bands:
        """Blend tiles into bands of rows of the image's own size.

        Args:
            tiles: goes through the windows and their tiles.
            size: height and width of the image.
            buffer: makes what keeps unfinished rows; default in memory.
        """
        # Bands of equal area: what is done with a band takes the same memory for every width.
        height = max(16, BAND_PIXELS // self.width)

        def bands() -> Generator[Tensor, None, None]:
            left = size[0]
            kept = None if buffer is None else buffer()
            for rows in blend_bands(tiles(), self.height, self.width, rows=height, buffer=kept):
                if left > 0:
                    yield rows[..., : min(left, rows.shape[-2]), : size[1]]
                left -= rows.shape[-2]
                del rows  # the next band can be a whole row of tiles away

        return bands

    def source_part(self, lr: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
        """The part of the unenlarged image that a window shows."""
        slices = []
        for start, length, small, large in (
            (window.top, window.height, lr.shape[-2], size[0]),
            (window.left, window.width, lr.shape[-1], size[1]),
        ):
            first = min(small - 1, start * small // large)
            slices.append(slice(first, max(first + 1, math.ceil(min(start + length, large) * small / large))))
        return lr[..., slices[0], slices[1]]


def tile_plan(
    generator: OneStepGenerator, size: tuple[int, int], tile: int | str | None, device: torch.device
) -> TilePlan:
    """Decide between one pass and tiles.

    Args:
        generator: gives the grid and the cost of a pixel.
        size: height and width of the enlarged image.
        tile: side in output pixels, rounded up to the grid; "auto"; or None for one pass.
        device: whose free memory counts.
    """
    multiple = generator.multiple
    height, width = (math.ceil(side / multiple) * multiple for side in size)
    affordable = max(multiple**2, int(free_memory(device) * MEMORY_SHARE / bytes_per_pixel(generator)))
    if tile is None:
        side = max(height, width)
    elif isinstance(tile, int):
        side = math.ceil(tile / multiple) * multiple
    else:
        wanted = AUTO_LATENTS * generator.backbone.latent_factor
        if height * width <= min(affordable, (SINGLE_PASS * wanted) ** 2):
            side = max(height, width)
        else:
            side = min(wanted, math.isqrt(affordable)) // multiple * multiple
    side = max(side, 2 * multiple)  # less leaves no room for an overlap
    windows = tile_windows(height, width, side, overlap=overlap_of(side, multiple), multiple=multiple)
    return TilePlan(windows, height, width, multiple, affordable)


def check_output_memory(size: tuple[int, int], batch: int) -> None:
    """Refuse an output that main memory cannot hold, before any work is done.

    Raises:
        InputError: with the memory that is needed and what is free.
    """
    needed, free = OUTPUT_BYTES * size[0] * size[1] * batch, free_memory(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"an output of {size[1]} x {size[0]} needs about {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; take a smaller scale, or write PNG or TIFF files, which are streamed"
        )


def overlap_of(side: int, multiple: int) -> int:
    """The overlap of tiles of a side: a quarter, on the grid, at least one step of it."""
    return max(multiple, round(side * OVERLAP / multiple) * multiple)


def bytes_per_pixel(generator: OneStepGenerator) -> int:
    """Working memory of one pass per output pixel, from the width of the autoencoder's outermost layers.

    The decoder's last blocks decide: about ten feature maps of twice the outermost width live at once, in float32.
    """
    config: Any = getattr(getattr(generator.backbone, "vae", None), "config", None)
    widths = getattr(config, "decoder_block_out_channels", None) or getattr(config, "block_out_channels", None)
    return 80 * int(min(widths) if widths else 64)


def run_pass(generator: OneStepGenerator, enlarged: Tensor, plan: TilePlan, dtype: torch.dtype) -> Tensor:
    """Encode, denoise and decode one window; smaller windows when memory runs out, float32 when NaN comes out.

    Args:
        enlarged: (B, 3, h, w) in [0, 1], sides on the grid.
        plan: remembers the largest size that fitted.
        dtype: precision of the networks.

    Returns:
        (B, 3, h, w) float32, finite, not clamped.

    Raises:
        InputError: not even the smallest window fits into memory.
        WeightsError: NaN or infinity even in float32.
    """
    side = max(enlarged.shape[-2:])
    while side <= plan.largest:
        try:
            return _finite(generator, enlarged, plan, dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The failed pass's tensors live as long as its exception does, so memory is handed back only here.
        release_memory(enlarged.device)
        _shrink(generator, plan, side)
    return apply_tiled(
        lambda part: run_pass(generator, part, plan, dtype),
        enlarged,
        plan.largest,
        overlap=overlap_of(plan.largest, plan.multiple),
        multiple=plan.multiple,
    )


def _shrink(generator: OneStepGenerator, plan: TilePlan, side: int) -> None:
    """Smaller tiles after memory ran out: of the autoencoder first, then of the whole pass.

    Raises:
        InputError: no smaller tiles are left.
    """
    factor = generator.backbone.latent_factor
    latents = min(plan.vae_side or side // factor, side // factor) // 2
    if hasattr(generator.backbone, "vae") and latents >= SMALLEST_VAE_TILE:
        plan.vae_side = latents
        warnings.warn(
            f"memory ran out at {side} pixels a side; going on with the autoencoder in tiles of {latents * factor}",
            stacklevel=3,
        )
        return
    half = side // 2 // plan.multiple * plan.multiple
    if half < 2 * plan.multiple:
        raise InputError(f"memory ran out even with tiles of {side} pixels; free some, or choose another device")
    warnings.warn(f"memory ran out at {side} pixels a side; going on with tiles of {half}", stacklevel=3)
    plan.largest = half


def _finite(generator: OneStepGenerator, enlarged: Tensor, plan: TilePlan, dtype: torch.dtype) -> Tensor:
    for precision in dict.fromkeys((dtype, torch.float32)):
        half = precision != torch.float32
        with (
            torch.autocast(enlarged.device.type, dtype=precision if half else None, enabled=half),
            _tiles_of(generator, plan),
        ):
            result = generator.decode(generator.denoise(generator.encode(enlarged))).float()
        if bool(torch.isfinite(result).all()):
            return result
    raise WeightsError("the networks give NaN or infinity for this image even in float32; the weights may be damaged")


@contextlib.contextmanager
def _tiles_of(generator: OneStepGenerator, plan: TilePlan) -> Iterator[None]:
    backbone = generator.backbone
    if plan.vae_side is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for autoencoder in (backbone.vae, getattr(backbone, "decoder", None)):
            if autoencoder is not None:
                stack.enter_context(vae_tiles(autoencoder, backbone.latent_factor, plan.vae_side))
        yield
