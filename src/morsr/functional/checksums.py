"""Which image files are read at all, and whether a PNG is whole."""

from __future__ import annotations

import zlib
from typing import BinaryIO

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for; it has parsers for dozens of other formats, whatever the suffix says."""


def check_png(file: BinaryIO) -> None:
    """Compare every chunk of a PNG file with its checksum; Pillow leaves out those of the pixels.

    Args:
        file: opened at any place, where it is again afterwards.

    Raises:
        OSError: a flipped bit, or no end.
    """
    before = file.tell()
    try:
        file.seek(8)
        name = b""
        while name != b"IEND":
            length, name = int.from_bytes(file.read(4), "big"), file.read(4)
            body, stored = file.read(length), file.read(4)
            if len(stored) < 4 or zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(stored, "big"):
                raise OSError("the PNG is damaged or cut short: a checksum does not match")
    finally:
        file.seek(before)
