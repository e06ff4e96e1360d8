"""Outputs too large to be held: written row by row, from an input that lies in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from morsr.functional.resample import bicubic_window
from morsr.models.passes import tile_plan
from morsr.models.picture import Form, Picture, planes_to_samples, to_planes
from morsr.models.picture_files import row_writer
from morsr.models.scratch import FilePixels, FileRows

if TYPE_CHECKING:
    from morsr.models.restorer import Restorer
    from morsr.models.settings import Settings

STREAM_PIXELS = 16_000_000
"""Files with larger outputs are written row by row instead of being held in memory."""


def is_streamed(size: tuple[int, int]) -> bool:
    """Whether a PNG or TIFF output of this height and width is written row by row."""
    return size[0] * size[1] > STREAM_PIXELS


def can_stream(picture: Picture, form: Form, size: tuple[int, int]) -> bool:
    """Whether an output is large enough to be streamed and of a form whose rows can be written one by one."""
    by_rows = form.format in ("PNG", "TIFF") and form.mode in ("L", "LA", "RGB", "RGBA") and form.depth < 32
    return by_rows and picture.black is None and is_streamed(size)


def stream_rows(
    file: IO[bytes],
    restorer: Restorer,
    picture: Picture,
    settings: Settings,
    pixels: FilePixels,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Restore a picture and write its rows as they are finished; memory hardly grows with the size.

    Args:
        file: opened for binary writing.
        restorer: the model, with the settings applied.
        picture: upright, in the form it is written in, its planes held by `pixels`.
        settings: of the call.
        pixels: whose folder takes the unfinished rows too.
        progress: called with (tiles done, tiles in all).
    """
    size, device = settings.size(picture), restorer.device
    plan = tile_plan(restorer.generator, size, settings.tile, device)
    writer = row_writer(file, picture.form, size[1], size[0])
    with contextlib.ExitStack() as stack:

        def scratch() -> FileRows:
            rows = FileRows(plan.width, plan.windows[0].height, folder=pixels.folder, device=device)
            stack.callback(rows.close)
            return rows

        bands, _ = restorer.bands(
            picture.rgb.to(device), size, plan, settings, progress, forget=pixels.forget, buffer=scratch
        )
        top = 0
        # Closed at once if the disk is full, so that merged weights are put back before the routing is cleared.
        for rows in stack.enter_context(contextlib.closing(bands())):
            height = rows.shape[-2]
            alpha = None
            if picture.alpha is not None:
                alpha = bicubic_window(picture.alpha, size, top=top, height=height, width=size[1]).clamp(0, 1)
            planes = to_planes(picture.replaced(rows.cpu(), alpha))
            writer.write(planes_to_samples(planes[0], picture.form))
            top += height
            del rows, alpha, planes  # the next band can be a whole row of tiles away
    writer.finish()
