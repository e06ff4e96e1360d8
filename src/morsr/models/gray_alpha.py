"""TIFF of 16-bit gray with alpha, as `TIFFWriter` makes it, read: neither Pillow nor OpenCV knows it."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from morsr.errors import InputError

WIDTH, HEIGHT, ICC = 256, 257, 34675
_BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _CHANNELS, _STRIP_BYTES = 258, 259, 262, 273, 277, 279
_X_DPI, _Y_DPI, _UNIT, _PLANAR, _PREDICTOR, _EXTRA = 282, 283, 296, 284, 317, 338
_DEFLATE = (8, 32946)


def gray_alpha_tags(data: bytes) -> ImageFileDirectory_v2 | None:
    """The tags of such a file; None for any other."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    file = BytesIO(data)
    try:
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        matches = (tags.get(_BITS), tags.get(_CHANNELS), tags.get(_PHOTOMETRIC)) == ((16, 16), 2, 1)
        return tags if matches and tags.get(_EXTRA) == (2,) else None
    except Exception:  # a damaged directory breaks Pillow's parser in many ways
        return None


def gray_alpha_samples(data: bytes, tags: ImageFileDirectory_v2) -> NDArray[np.uint16]:
    """Samples (H, W, 2) in stored orientation.

    Args:
        data: the file.
        tags: see `gray_alpha_tags`.

    Raises:
        InputError: more than one page, a layout that cannot be read, or a file cut short.
    """
    if tags.next:
        raise InputError("the image has more than one page; split it and give one at a time")
    compression, predictor = tags.get(_COMPRESSION, 1), tags.get(_PREDICTOR, 1)
    if compression not in (1, *_DEFLATE) or predictor not in (1, 2) or tags.get(_PLANAR, 1) != 1 or _STRIPS not in tags:
        raise InputError(
            "16-bit gray with alpha is read from TIFF of interleaved strips, deflated or not compressed; "
            "this one is laid out otherwise, convert it to PNG"
        )
    width, height = tags[WIDTH], tags[HEIGHT]
    size = width * height * 4
    pixels = bytearray()
    for start, length in zip(tags[_STRIPS], tags[_STRIP_BYTES], strict=True):
        strip = data[start : start + length]
        left = size - len(pixels)
        if left > 0:  # a limit of 0 would be none
            pixels += zlib.decompressobj().decompress(strip, left) if compression in _DEFLATE else strip[:left]
    if len(pixels) < size:
        raise InputError("the file is cut short")
    samples = np.frombuffer(pixels, "<u2" if data[:2] == b"II" else ">u2").reshape(height, width, 2)
    if predictor == 2:
        return np.cumsum(samples, axis=1, dtype=np.uint16)  # wraps around, as the format wants
    return samples.astype(np.uint16)


def gray_alpha_info(tags: ImageFileDirectory_v2) -> dict[str, Any]:
    """The resolution in dots per inch, as Pillow's `info` has it."""
    if _X_DPI not in tags or _Y_DPI not in tags or tags.get(_UNIT, 2) not in (2, 3):
        return {}
    factor = 2.54 if tags.get(_UNIT, 2) == 3 else 1
    return {"dpi": (float(tags[_X_DPI]) * factor, float(tags[_Y_DPI]) * factor)}
