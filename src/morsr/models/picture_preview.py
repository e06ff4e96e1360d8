"""An output file of any size, reduced to what a screen shows."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from PIL import Image

from morsr.errors import InputError
from morsr.models.picture import Picture, from_pil
from morsr.models.picture_files import MAX_PIXELS, file_format, read_file

_LIMIT_LOCK = threading.Lock()


def read_reduced(path: str | os.PathLike[str], side: int) -> Picture:
    """Read a file that this program wrote, whatever its size; reduced if it is one that `read_file` would refuse.

    Args:
        path: the file, in the format that its suffix says.
        side: the longer side in pixels that a reduced picture has at least; up to twice that come.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with _without_pillows_limit(), Image.open(path, formats=[file_format(path)]) as image:
            if image.width * image.height > MAX_PIXELS:
                return from_pil(_reduced(image, side), kind="file", compact=True)
    except Image.UnidentifiedImageError:
        return read_file(path, max_pixels=sys.maxsize, compact=True)
    except Exception as error:  # as in `read_file`
        raise InputError(f"{path}: cannot be decoded ({error})") from error
    return read_file(path, compact=True)


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Let Pillow open images of any size inside a ``with`` block; what `read_file` reads meanwhile is checked there."""
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """An opened image with a whole fraction of its pixels, averages of blocks, in a mode that has averages."""
    factor = max(1, max(image.size) // side)
    image.draft(None, (image.width // factor, image.height // factor))  # JPEG alone can leave pixels out
    image.load()
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode.startswith("I;16"):
        image = image.convert("I")
    return image.reduce(max(1, max(image.size) // side))
