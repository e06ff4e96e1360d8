"""Image files: PNG, JPEG, WebP, TIFF and GIF by libvips, BMP by Pillow; written whole or not at all.

Only regular files with the first bytes of one of these formats are read. All checksums of a PNG are compared.
"""

from __future__ import annotations

import functools
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from morsr.errors import InputError, MorsrError, check_images
from morsr.files import atomic_path, printable
from morsr.imaging.listing import FORMATS, KNOWN_SUFFIXES, check_regular
from morsr.imaging.picture import Picture, from_pil, from_samples, to_pil, to_uint8

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a few bytes can claim terabytes of pixels."""

MAX_BYTES = 2**31

QUALITY = 95
"""Of JPEG and lossy WebP."""

_HEADS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
}
_KEPT = ("icc-profile-data", "exif-data", "xmp-data", "iptc-data")
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}
_OPAQUE_ONLY = ("JPEG", "BMP")
_XMP_ROTATION = rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]"""


def read(source: Any) -> Picture:
    """Read one still picture, turned upright.

    Args:
        source: a path, a PIL image, or a numpy array (H, W) or (H, W, C) with 1 to 4 channels of uint8, uint16 or
            floats in [0, 1]. The content of a file decides its format, not the suffix.

    Raises:
        InputError: anything else; damaged, animated or multi-page images, values out of range. One line says what.
    """
    return _read(source, _by_vips)


def read_rgb(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The colours of an image file, uint8 (H, W, 3), by Pillow alone, which is safe in forked worker processes.

    The picture is turned upright, gray is repeated, 16 bits become 8 and alpha is dropped.

    Raises:
        InputError: as `read`.
    """
    return _read(path, _by_pillow).rgb8


def read_planes(image: Any) -> Tensor:
    """Colours (B, 3, H, W), float32 in [0, 1], of anything that `read` takes or of a tensor of that shape.

    Raises:
        InputError: as `read`, and a tensor of another shape, type or range.
    """
    if not isinstance(image, Tensor):
        return read(image).rgb
    return check_images(image).detach().float().clamp(0, 1)


def _read(source: Any, decoder: Callable[[bytes], Picture]) -> Picture:
    """Whatever goes wrong becomes one line that names the image."""
    try:
        if isinstance(source, np.ndarray):
            return from_samples(source)
        if isinstance(source, Image.Image):
            return _by_pillow(source)
        if isinstance(source, (str, os.PathLike)):
            return decoder(_content(source))
        raise InputError("expected a path, PIL image or numpy array")
    except Exception as error:  # decoders of damaged files raise anything from struct.error to SyntaxError
        is_path = isinstance(source, (str, os.PathLike))
        name = printable(os.fspath(source)) if is_path else f"the {type(source).__name__}"
        text = printable(" ".join(str(error).split()))[:200]
        if isinstance(error, MemoryError):
            text = "memory ran out while it was read"
        elif not isinstance(error, MorsrError) and getattr(error, "errno", None) is None:
            text = f"cannot be read ({text or type(error).__name__})"
        raise InputError(text if name in text else f"{name}: {text}") from error


def _content(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file, once its first ones are those of an image."""
    size = check_regular(path).st_size
    with open(path, "rb") as file:
        _format(head := file.read(16))
        if size > MAX_BYTES:
            raise InputError(f"{size / 2**30:.1f} GiB are more than {MAX_BYTES // 2**30} GiB, refused")
        return head + file.read(size - len(head))


def _format(head: bytes) -> str:
    """Pillow's name of a file's format by its first bytes."""
    for name, pattern in _HEADS.items():
        if re.match(pattern, head, re.DOTALL):
            return name
    raise InputError("not a PNG, JPEG, WebP, TIFF, GIF or BMP image" if head else "the file is empty")


def _by_vips(data: bytes) -> Picture:
    if (format := _format(data)) == "BMP":
        return _by_pillow(data)
    if format == "PNG":
        _check_png(data)
    image = getattr(_vips().Image, f"{format.lower()}load_buffer")(data, fail_on="warning", access="sequential")
    _check_pixels(image.width, image.height)
    fields = image.get_fields()
    if "n-pages" in fields and (pages := image.get("n-pages")) > 1:
        raise InputError(f"the image has {pages} frames or pages; split it and give one at a time")
    names = [name for name in fields if name in _KEPT or name.startswith("png-comment-")]
    notes = {name: image.get(name) for name in names} | {"dpi": (image.xres * 25.4, image.yres * 25.4)}
    if image.interpretation in ("cmyk", "lab", "labs"):
        image = image.colourspace("rgb16" if image.format == "ushort" else "srgb")
        notes.pop("icc-profile-data", None)
    lossless = format != "JPEG" and (format != "WEBP" or b"VP8L" in data)  # the name of a lossless part
    try:
        if "orientation" in fields and image.get("orientation") > 1:
            image = image.copy_memory().autorot()
        pixels = image.numpy()
    except _vips().Error as error:
        if "Invalid SOS parameters" not in str(error):
            raise
        return _by_pillow(data)  # a whole JPEG as some phones write it
    return from_samples(pixels, format=format, lossless=lossless, notes=notes)


def _by_pillow(source: bytes | Image.Image) -> Picture:
    """A file's content, or a PIL image, whose pixels may still have to be decoded from its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Any = Image.open(BytesIO(source), formats=[_format(source)]) if isinstance(source, bytes) else source
        _check_pixels(*image.size)
        if image.format == "PNG" and (file := getattr(image, "fp", None)) is not None:
            at = file.tell()
            file.seek(0)
            _check_png(file.read())
            file.seek(at)
        return from_pil(image)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels, refused")


def _check_png(data: bytes) -> None:
    """Compare every part of a PNG with its checksum; decoders leave some of them out."""
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data) or zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            break
        if name == b"IEND":
            return
        if name == b"acTL" and (frames := int.from_bytes(view[at + 8 : at + 12], "big")) > 1:
            raise InputError(f"the image has {frames} frames; split it and give one at a time")
        at = end + 4
    raise InputError("damaged or cut short (a checksum does not match)")


@functools.cache
def _started() -> tuple[Any, int]:
    os.environ.setdefault("VIPS_WARNING", "1")  # what is wrong with a file is in the error
    import pyvips

    pyvips.cache_set_max(0)  # the cache knows names only: a file that was written anew would come back as it was
    return pyvips, os.getpid()


def _vips() -> Any:
    vips, process = _started()
    if process != os.getpid():
        raise InputError("libvips hangs in a forked process; start it by spawn, or use morsr.imaging.read_rgb")
    return vips


def file_format(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that a path's suffix asks for.

    Raises:
        InputError: a format that cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        shown, got = printable(os.fspath(path)), printable(suffix or "no suffix")
        raise InputError(f"{shown}: expected an output format among {KNOWN_SUFFIXES}, got {got!r}")
    return FORMATS[suffix]


def check_output(picture: Picture, path: str | os.PathLike[str], size: tuple[int, int]) -> str:
    """Check that a format can hold a picture of `size` (height, width), before any work; returns the format's name.

    Raises:
        InputError: transparency into a format that has none, or more pixels along a side than the format allows.
    """
    name, shown = file_format(path), printable(os.fspath(path))
    most = _LARGEST_SIDE.get(name, 2**31 - 1)
    if max(size) > most:
        raise InputError(f"{shown}: {name} holds at most {most} pixels a side, the output has {max(size)}")
    if name in _OPAQUE_ONLY and picture.transparent:
        raise InputError(f"{shown}: {name} holds no transparency and the image uses it; write PNG, WebP or TIFF")
    return name


def write(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Write a picture to a file, with its depth where the format has it; whole, or not at all.

    Args:
        picture: upright, and so its notes then claim no rotation.
        path: its suffix decides the format.

    Raises:
        InputError: the format cannot hold the picture, or the file cannot be written; an existing file is unchanged.
    """
    name, samples = check_output(picture, path, picture.size), picture.samples
    if name in _OPAQUE_ONLY:
        samples = picture.pixels
    if name not in ("PNG", "TIFF"):
        samples = to_uint8(samples)
    elif name == "PNG" and samples.dtype.kind == "f":
        samples = np.rint(samples * 65535).astype(np.uint16)
    try:
        with atomic_path(path) as part:
            if name == "BMP":
                to_pil(Picture(samples=samples)).save(part, format=name, dpi=picture.notes.get("dpi", (96, 96)))
            else:
                # In a thread: Ctrl-C during a callback of libvips would be lost.
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(_save, part, name, replace(picture, samples=samples)).result()
    except Exception as error:  # of the system or of an encoder, libvips' own among them
        text = getattr(error, "strerror", None) or printable(" ".join(str(error).split()))[:200]
        raise InputError(f"{printable(os.fspath(path))}: cannot be written ({text})") from error


def _save(part: Path, name: str, picture: Picture) -> None:
    vips, samples, notes = _vips(), picture.samples, dict(picture.notes)
    gray, deep = samples.shape[2] < 3, samples.dtype == np.uint16
    space = ("grey16" if deep else "b-w") if gray else ("rgb16" if deep else "srgb")
    x, y = notes.pop("dpi", (72, 72))
    image = vips.Image.new_from_array(np.ascontiguousarray(samples))
    image = image.copy(interpretation=space, xres=x / 25.4, yres=y / 25.4)
    image.set_type(vips.GValue.gstr_type, "resolution-unit", "in")
    if name == "WEBP" and gray:  # which makes colours of it
        notes.pop("icc-profile-data", None)
    for key, value in notes.items():
        if key == "xmp-data":
            value = re.sub(_XMP_ROTATION, rb"\g<1>1", value)
        if isinstance(value, str) and f"{key}{value}".isascii():  # libvips writes no other code
            image.set_type(vips.GValue.gstr_type, key, value)
        elif isinstance(value, bytes):
            image.set_type(vips.GValue.blob_type, key, value)
    image.set_type(vips.GValue.gint_type, "orientation", 1)  # last: EXIF data bring theirs back
    if (canvas := picture.canvas) is not None:
        image.set_progress(True)
        image.signal_connect("eval", lambda *_: canvas.release())
    options: dict[str, Any] = {
        "PNG": {"compression": 6, "filter": "all"},
        "JPEG": {"Q": QUALITY, "subsample_mode": "off", "optimize_coding": True},
        "WEBP": {"lossless": True} if picture.lossless and picture.format == "WEBP" else {"Q": QUALITY},
        "TIFF": {"compression": "deflate", "predictor": "horizontal", "bigtiff": samples.nbytes > 4_000_000_000},
        "GIF": {},
    }[name]
    getattr(image, f"{name.lower()}save")(os.fsencode(part), **options)
