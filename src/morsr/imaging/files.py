"""Image files: PNG, JPEG, WebP and TIFF by libvips, BMP, GIF and PPM by Pillow; written whole or not at all.

Only regular files with the first bytes of one of these formats are read. All checksums of a PNG are compared.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from morsr.errors import InputError, MorsrError, check_images
from morsr.files import atomic_path, printable
from morsr.imaging.canvas import Canvas
from morsr.imaging.listing import FORMATS, KNOWN_SUFFIXES, check_regular
from morsr.imaging.picture import Notes, Picture, from_array, from_pil, from_samples, stored_orientation, to_uint8

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a few bytes can claim terabytes of pixels."""

MAX_BYTES = 2**31

QUALITY = 95
"""Of JPEG and lossy WebP."""

HEADER_BYTES = 2**22
"""Where the size of a JPEG, GIF or PPM must stand; Pillow passes over bytes without meaning one by one."""

_BY_VIPS = ("PNG", "JPEG", "WEBP", "TIFF")
_SPACES = {1: ("b-w", "grey16"), 2: ("b-w", "grey16"), 3: ("srgb", "rgb16"), 4: ("srgb", "rgb16")}
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}
_OPAQUE_ONLY = ("JPEG", "BMP", "PPM")
_XMP_ROTATION = rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]"""
_SEGMENT = 65_000
"""Bytes of EXIF or XMP data that a JPEG holds, with room for their name."""


def read(source: Any) -> Picture:
    """Read one still picture, turned upright.

    Args:
        source: a path, the bytes of a file, a PIL image, a Picture, or a numpy array (H, W) or (H, W, C) with 1 to 4
            channels of uint8, uint16 or floats in [0, 1]. The content of a file decides its format, not the suffix.

    Raises:
        InputError: anything else; damaged, animated or multi-page images, values out of range. One line says what.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        return from_array(source)
    if isinstance(source, (str, os.PathLike)):
        return _named(source, lambda: _decoded(_content(source)))
    if isinstance(source, bytes):
        return _named("the image", lambda: _decoded(source))
    if isinstance(source, Image.Image):
        return _named("the PIL image", lambda: _from_opened(source))
    raise InputError(f"expected a path, PIL image, numpy array or bytes, got {type(source).__name__}")


def read_planes(image: Any) -> Tensor:
    """Colours (B, 3, H, W), float32 in [0, 1], of anything that `read` takes or of a tensor of that shape.

    Raises:
        InputError: as `read`, and a tensor of another shape, type or range.
    """
    if not isinstance(image, Tensor):
        return read(image).rgb
    return check_images(image).detach().float().clamp(0, 1)


def read_rgb(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read the colours of an image file by Pillow alone, which is safe in forked worker processes.

    The picture is turned upright, gray is repeated, 16 bits become 8 and alpha is dropped.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: as `read`.
    """
    return _named(path, lambda: _decoded(_content(path), by_vips=False).rgb8)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image file as it will be seen, from its header alone.

    Raises:
        InputError: no regular file, or not an image.
    """

    def found() -> tuple[int, int]:
        check_regular(path)
        try:
            with opened(path) as image:
                turned = stored_orientation(image) in (5, 6, 7, 8)
                width, height = image.size
                if image.format == "TIFF":  # whose size Pillow has turned already
                    width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        except Image.UnidentifiedImageError:
            with open(path, "rb") as file:
                if _format(file.read(16)) != "TIFF":
                    raise
            image = _vips().Image.tiffload(os.fspath(path))  # a layout that Pillow does not know
            width, height, turned = image.width, image.height, _value(image, "orientation", 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)

    return _named(path, found)


def thumbnail(path: str | os.PathLike[str], side: int) -> Image.Image:
    """An image file of any size, reduced to at most `side` pixels a side, over gray where it is transparent.

    Raises:
        InputError: it cannot be read.
    """

    def found() -> Image.Image:
        with open(path, "rb") as file:
            if _format(file.read(16)) in _BY_VIPS:
                image = _vips().Image.thumbnail(os.fspath(path), side, size="down", fail_on="warning")
                image = image.colourspace("srgb")
                return Image.fromarray((image.flatten(background=128) if image.hasalpha() else image).numpy())
        small = Image.fromarray(read(path).rgb8)
        small.thumbnail((side, side))
        return small

    return _named(path, found)


def _named(name: str | os.PathLike[str], work: Any) -> Any:
    """Run `work` and turn whatever it raises into one line that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except Exception as error:  # decoders of damaged files raise anything from struct.error to SyntaxError
        name, text = printable(os.fspath(name)), printable(" ".join(str(error).split()))
        if isinstance(error, MorsrError):
            raise InputError(text if name in text else f"{name}: {text}") from error
        if isinstance(error, Image.DecompressionBombError):
            text = f"more than {MAX_PIXELS:,} pixels, refused"
        elif isinstance(error, MemoryError):
            text = "memory ran out while it was read"
        elif not isinstance(error, OSError) or error.errno is None:
            text = f"damaged or cut short ({text[:200] or type(error).__name__})"
        raise InputError(f"{name}: {text}") from error


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
    for name, pattern in (
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("JPEG", rb"\xff\xd8\xff"),
        ("WEBP", rb"RIFF....WEBP"),
        ("TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM"),
        ("PPM", rb"P[2356]\s"),
    ):
        if re.match(pattern, head, re.DOTALL):
            return name
    raise InputError("not a PNG, JPEG, WebP, TIFF, BMP, GIF or PPM image" if head else "the file is empty")


def _decoded(data: bytes, *, by_vips: bool = True) -> Picture:
    format = _format(data[:16])
    if format == "PNG":
        _check_png(data)
    if not by_vips or format not in _BY_VIPS:
        with opened(BytesIO(data)) as opened_image:
            _check_pixels(*opened_image.size)
            return from_pil(opened_image, kind="file")
    load = getattr(_vips().Image, f"{format.lower()}load_buffer")
    image = load(data, fail_on="warning", access="sequential")
    _check_pixels(image.width, image.height)
    if (pages := _value(image, "n-pages", 1)) > 1:
        raise InputError(f"the image has {pages} frames or pages; split it and give one at a time")
    icc, deep = _value(image, "icc-profile-data"), image.format == "ushort"
    if image.interpretation in ("cmyk", "lab", "labs"):
        image, icc = image.colourspace("rgb16" if deep else "srgb"), None
    if image.format not in ("uchar", "ushort", "float") or image.bands > 4:
        raise InputError(f"{image.bands} channels of {image.format} samples are not read; save it with 8 or 16 bits")
    keys = [name for name in image.get_fields() if name.startswith("png-comment-")]
    notes = Notes(
        icc=icc,
        exif=_value(image, "exif-data"),
        xmp=_value(image, "xmp-data"),
        iptc=_value(image, "iptc-data"),
        dpi=(image.xres * 25.4, image.yres * 25.4),
        texts={name.split("-", 3)[3]: image.get(name) for name in keys},
    )
    lossless = format != "JPEG" and (format != "WEBP" or _is_lossless_webp(data))
    orientation = _value(image, "orientation", 1)
    return from_samples(image.numpy(), orientation, format=format, lossless=lossless, notes=notes)


def _from_opened(image: Image.Image) -> Picture:
    """A PIL image; the checksums of a PNG that is still to be decoded are compared, which Pillow does not do."""
    file: Any = getattr(image, "fp", None)
    if image.format == "PNG" and file is not None:
        at = file.tell()
        file.seek(0)
        _check_png(file.read())
        file.seek(at)
    return from_pil(image)


def opened(file: Any) -> Image.Image:
    """Open a path or a file by Pillow, with the decoders of our formats only: that of EPS would start Ghostscript."""
    formats = sorted(set(FORMATS.values()))
    with open(file, "rb") if isinstance(file, (str, os.PathLike)) else contextlib.nullcontext(file) as stream:
        head = stream.read(16)
        if _format(head) in ("JPEG", "GIF", "PPM"):
            Image.open(BytesIO(head + stream.read(HEADER_BYTES)), formats=formats)
        stream.seek(0)
    return Image.open(file, formats=formats)


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
        at = end + 4
    raise InputError("damaged or cut short (a checksum does not match)")


def _is_lossless_webp(data: bytes) -> bool:
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        if name in (b"VP8 ", b"VP8L"):
            return bool(name == b"VP8L")
        at += 8 + length + length % 2
    return False


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


def _value(image: Any, name: str, default: Any = None) -> Any:
    return image.get(name) if image.get_typeof(name) else default


def file_format(path: str | os.PathLike[str], wanted: str | None = None) -> str:
    """Pillow's name of the format that a path's suffix, or `wanted` (such as "png"), asks for.

    Raises:
        InputError: a format that cannot be written.
    """
    suffix = f".{wanted.lower().lstrip('.')}" if wanted else Path(path).suffix.lower()
    if suffix not in FORMATS:
        shown, got = printable(os.fspath(path)), printable(wanted or suffix or "no suffix")
        raise InputError(f"{shown}: expected an output format among {KNOWN_SUFFIXES}, got {got!r}")
    return FORMATS[suffix]


def check_output(
    picture: Picture, path: str | os.PathLike[str], size: tuple[int, int], format: str | None = None
) -> str:
    """Check that a format can hold a picture, before any work; returns Pillow's name of the format.

    Args:
        picture: whose alpha matters.
        path, format: see `file_format`.
        size: height and width that will be written.

    Raises:
        InputError: transparency into a format that has none, or more pixels along a side than the format allows.
    """
    name, shown = file_format(path, format), printable(os.fspath(path))
    most = _LARGEST_SIDE.get(name, 2**31 - 1)
    if max(size) > most:
        raise InputError(f"{shown}: {name} holds at most {most} pixels a side, the output has {max(size)}")
    if name in _OPAQUE_ONLY and picture.transparent:
        raise InputError(f"{shown}: {name} holds no transparency and the image uses it; write PNG, WebP or TIFF")
    if Path(path).is_dir():
        raise InputError(f"{shown}: expected a file to write, this is a folder")
    return name


def write(
    picture: Picture,
    path: str | os.PathLike[str],
    *,
    samples: NDArray[Any] | Canvas | None = None,
    format: str | None = None,
) -> None:
    """Write a picture to a file, with its depth where the format has it; whole, or not at all.

    Args:
        picture: gives the pixels and the notes. Pixels are upright, and the notes then claim no rotation.
        path: its suffix decides the format, unless `format` does ("png", "jpg", …).
        samples: (H, W, C) instead of the picture's own, from `Picture.samples`. The memory of a canvas in a file is
            given back part by part while it is written.

    Raises:
        InputError: the format cannot hold the picture, or the file cannot be written; an existing file is unchanged.
    """
    values = picture.stacked() if samples is None else samples.values if isinstance(samples, Canvas) else samples
    name = check_output(picture, path, (values.shape[0], values.shape[1]), format)
    if values.shape[2] in (2, 4) and name in _OPAQUE_ONLY:
        values = values[..., :-1]
    if values.dtype != np.uint8 and name not in ("PNG", "TIFF"):
        values = to_uint8(values)
    elif values.dtype.kind == "f" and name == "PNG":
        values = np.rint(values * 65535).astype(np.uint16)
    lossless = picture.lossless and picture.format == "WEBP"
    try:
        with atomic_path(path) as part:
            if name in ("BMP", "PPM"):
                image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
                image.save(part, format=name, dpi=picture.notes.dpi or (96, 96))
            else:
                _save(values, part, name, picture.notes, lossless, samples)
    except MorsrError:
        raise
    except Exception as error:  # of the system or of an encoder, libvips' own among them
        text = getattr(error, "strerror", None) or printable(" ".join(str(error).split()))[:200]
        raise InputError(f"{printable(os.fspath(path))}: cannot be written ({text})") from error


def _save(values: NDArray[Any], part: Path, name: str, notes: Notes, lossless: bool, canvas: Any) -> None:
    vips = _vips()
    height, width, channels = values.shape
    image = vips.Image.new_from_memory(
        np.ascontiguousarray(values), width, height, channels, {1: "uchar", 2: "ushort", 4: "float"}[values.itemsize]
    )
    x, y = notes.dpi or (72, 72)
    space = _SPACES[channels][values.dtype == np.uint16]
    image = image.copy(interpretation=space, xres=x / 25.4, yres=y / 25.4)
    image.set_type(vips.GValue.gstr_type, "resolution-unit", "in")
    exif, xmp = notes.exif, notes.xmp and re.sub(_XMP_ROTATION, rb"\g<1>1", notes.xmp)
    icc = None if name == "WEBP" and channels < 3 else notes.icc  # WebP makes colours of gray
    for key, value in (("icc-profile-data", icc), ("exif-data", exif), ("xmp-data", xmp), ("iptc-data", notes.iptc)):
        if value and not (name == "JPEG" and key in ("exif-data", "xmp-data") and len(value) > _SEGMENT):
            image.set_type(vips.GValue.blob_type, key, value)
    for index, (key, text) in enumerate(notes.texts.items()):
        if f"{key}{text}".isascii():  # libvips writes no other code
            image.set_type(vips.GValue.gstr_type, f"png-comment-{index}-{key}", text)
    image.set_type(vips.GValue.gint_type, "orientation", 1)  # last: EXIF data bring theirs back
    if isinstance(canvas, Canvas):
        image.set_progress(True)
        image.signal_connect("eval", lambda *_: canvas.release())
    options: dict[str, Any] = {
        "PNG": {"compression": 6, "filter": "all"},
        "JPEG": {"Q": QUALITY, "subsample_mode": "off", "optimize_coding": True},
        "WEBP": {"lossless": True} if lossless else {"Q": QUALITY},
        "TIFF": {"compression": "deflate", "predictor": "horizontal", "bigtiff": values.nbytes > 4_000_000_000},
        "GIF": {},
    }[name]
    getattr(image, f"{name.lower()}save")(os.fspath(part), **options)
