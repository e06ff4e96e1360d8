"""Pictures in files: PNG, JPEG, WebP, TIFF, BMP and single-frame GIF, 8 or 16 bits, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from morsr.errors import InputError, MorsrError
from morsr.files import atomic_path
from morsr.functional.resample import unit_range
from morsr.models.gray_alpha import HEIGHT, ICC, WIDTH, gray_alpha_info, gray_alpha_samples, gray_alpha_tags
from morsr.models.picture import (
    ORIENTATION_TAG,
    Form,
    Picture,
    cmyk_to_srgb,
    from_pil,
    from_samples,
    parse_exif,
    resized_exif,
    stored_orientation,
    to_pil,
    to_samples,
)
from morsr.models.picture_metadata import color_chunks, dots_per_inch, save_options, texts, without_rotation
from morsr.models.rasters import PNGWriter, RowWriter, TIFFWriter, write_bmp_rgba

MAX_PIXELS = 100_000_000
"""Larger images are refused: a few bytes can claim to be terabytes of pixels."""

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
}
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
_MODES = {
    "PNG": ("1", "L", "LA", "P", "PA", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "PA"),
}
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}
_DEEP = ("PNG", "TIFF")
_BITS, _PLANAR, _EXTRA_SAMPLES = 258, 284, 338  # tags of TIFF
_OPAQUE = 1 - 0.5 / 255  # what 8 bits round to opaque


def read_file(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, compact: bool = False) -> Picture:
    """Read an image file.

    Args:
        path: PNG, JPEG, WebP, TIFF, BMP or GIF; the content decides, not the suffix.
        max_pixels: an image that claims more is refused before it is decoded.
        compact: keep whole numbers as they are where the mode allows it, a quarter of the memory.

    Raises:
        InputError: no such file, not an image, cut short, too large, animated or multi-page.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise InputError(f"{path}: the file is empty")
    try:
        return _decode(data, max_pixels, compact)
    except MorsrError as error:
        raise InputError(f"{path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: not a PNG, JPEG, WebP, TIFF, BMP or GIF image") from error
    except Exception as error:  # decoders of broken files raise anything from struct.error to SyntaxError
        raise InputError(f"{path}: cannot be decoded, the file is damaged or cut short ({error})") from error


def header_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image file as it will be seen, from its header alone.

    Raises:
        InputError: no such file, or not an image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if image.format == "TIFF":  # Pillow's size is turned already where a tag says so, not where XMP does
                width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
            turned = stored_orientation(image) in (5, 6, 7, 8)
    except Exception as error:  # as in `read_file`
        tags = _tags_of_gray_alpha(path, error)
        if tags is None or not all(isinstance(tags.get(tag), int) for tag in (WIDTH, HEIGHT)):
            raise InputError(f"{path}: not an image ({error})") from error
        width, height, turned = tags[WIDTH], tags[HEIGHT], tags.get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _tags_of_gray_alpha(path: str | os.PathLike[str], error: Exception) -> ImageFileDirectory_v2 | None:
    """The tags of a file that Pillow has not identified, if `gray_alpha.py` can read it."""
    return gray_alpha_tags(Path(path).read_bytes()) if isinstance(error, Image.UnidentifiedImageError) else None


def _decode(data: bytes, max_pixels: int, compact: bool) -> Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(BytesIO(data), formats=sorted(set(FORMATS.values())))
        except Image.DecompressionBombError as error:
            raise InputError(f"more than {max_pixels:,} pixels, refused") from error
        except Image.UnidentifiedImageError:
            if (tags := gray_alpha_tags(data)) is None:
                raise
            return _decode_gray_alpha(data, tags, max_pixels, compact)
        with image:
            _check_pixels(image.width, image.height, max_pixels)
            deep = _is_deep(image, data)
            picture = from_pil(image, kind="file", compact=compact)
            compression = image.info.get("compression")
            layout: Any = getattr(image, "tag_v2", {})
    form = replace(picture.form, format="JPEG" if picture.form.format == "MPO" else picture.form.format)
    if form.format == "WEBP":
        form = replace(form, info={**form.info, "lossless": _is_lossless_webp(data)})
    if form.format == "TIFF" and compression:
        form = replace(form, info={**form.info, "compression": compression})
    if not deep:
        return replace(picture, form=form)
    if form.mode not in ("LA", "RGB", "RGBA"):
        raise InputError(f"16-bit {form.mode} images are not supported; convert to RGB first")
    if layout.get(_PLANAR, 1) != 1:
        raise InputError("16-bit colours in separate planes are not supported; save them interleaved")
    if form.format == "PNG" and data[25] == 4:  # gray with alpha, which Pillow widens
        form = replace(form, mode="LA")
    form = replace(form, depth=16)
    samples = _decode_deep(data, form, picture.size)
    if form.mode == "RGBA" and layout.get(_EXTRA_SAMPLES) == (1,):
        samples = _unassociated(samples)
    return from_samples(samples, form, compact=compact)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InputError(f"{width} x {height} is more than {max_pixels:,} pixels, refused")


def _decode_gray_alpha(data: bytes, tags: ImageFileDirectory_v2, max_pixels: int, compact: bool) -> Picture:
    _check_pixels(tags[WIDTH], tags[HEIGHT], max_pixels)
    form = Form(
        kind="file",
        mode="LA",
        depth=16,
        orientation=tags.get(ORIENTATION_TAG, 1),
        format="TIFF",
        icc=tags.get(ICC),
        info=gray_alpha_info(tags),
    )
    return from_samples(gray_alpha_samples(data, tags), form, compact=compact)


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the pixels of a WebP are in a chunk of the lossless kind; a profile of any length may stand before it."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        if name in (b"VP8 ", b"VP8L"):
            return bool(name == b"VP8L")
        at += 8 + length + length % 2
    return False


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether the file has 16-bit samples that Pillow would read as 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        return False
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS, (8,))  # type: ignore[attr-defined]
        return max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return False


def _decode_deep(data: bytes, form: Form, size: tuple[int, int]) -> NDArray[np.uint16]:
    """Colours of 16 bits in stored orientation; of a TIFF, as from Pillow, they come upright."""
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged file is told by an error alone
    try:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if samples is None or samples.dtype != np.uint16:
        raise InputError("the 16-bit samples cannot be decoded")
    if samples.shape[0] * samples.shape[1] != size[0] * size[1]:
        raise InputError("the file's decoders disagree on its size")
    channels = {"LA": 2, "RGB": 3, "RGBA": 4}[form.mode]
    if samples.ndim == 2:
        samples = samples[..., None].repeat(3, axis=2)
    colours = samples[..., 2::-1]
    if channels in (2, 4):
        if samples.shape[2] != 4:
            raise InputError("the 16-bit alpha channel cannot be decoded")
        colours = np.concatenate([colours[..., : channels - 1], samples[..., 3:]], axis=2)
    return np.ascontiguousarray(colours)


def _unassociated(samples: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """RGBA without the factor of alpha that the colours of some TIFF files carry; clear pixels keep theirs."""
    alpha = np.where(samples[..., 3:] == 0, 65535, samples[..., 3:]).astype(np.float32)
    colours = np.rint(samples[..., :3] * (65535 / alpha)).clip(0, 65535).astype(np.uint16)
    return np.concatenate([colours, samples[..., 3:]], axis=2)


def file_format(path: str | os.PathLike[str], wanted: str | None = None) -> str:
    """Pillow's name of the format that a path's suffix, or `wanted` (such as "png"), asks for.

    Raises:
        InputError: a format that cannot be written.
    """
    suffix = f".{wanted.lower().lstrip('.')}" if wanted else Path(path).suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise InputError(f"{path}: expected an output format among {known}, got {wanted or suffix or 'no suffix'!r}")
    return FORMATS[suffix]


def form_for(picture: Picture, path: str | os.PathLike[str], size: tuple[int, int], format: str | None = None) -> Form:
    """The form in which a picture can be written to a format: its own, or the nearest one that loses nothing seen.

    Args:
        picture: as it was read; only its form and whether its alpha is used matter.
        path, format: see `file_format`.
        size: height and width that will be written.

    Raises:
        InputError: transparency into a format that has none, or more pixels along a side than the format allows.
    """
    name, form = file_format(path, format), picture.form
    if max(size) > _LARGEST_SIDE.get(name, 2**31 - 1):
        raise InputError(
            f"{path}: {name} holds at most {_LARGEST_SIDE[name]} pixels a side, the output has {max(size)}"
        )
    mode = form.mode
    if mode not in _MODES[name]:
        opaque = {"LA": "L", "RGBA": "RGB", "PA": "P"}.get(mode)
        if opaque and (picture.alpha is None or bool((unit_range(picture.alpha) > _OPAQUE).all())):
            mode = opaque
        if mode not in _MODES[name]:
            mode = _nearest_mode(mode, name, path)
    depth = form.depth if name in _DEEP or form.depth == 8 else 8
    if depth == 32 and not (name == "TIFF" and mode == "L"):
        depth = 16
    if depth != 8 and mode == "PA":
        mode = "RGBA"
    icc = None if form.mode == "CMYK" and mode != "CMYK" else form.icc
    if icc and (mode in ("L", "LA", "1")) != (form.mode in ("L", "LA", "1")):
        icc = None  # a gray profile does not describe RGB samples, nor the other way round
    orientation = form.orientation if _keeps_orientation(form, name) else 1
    return replace(form, kind="file", mode=mode, depth=depth, icc=icc, orientation=orientation, format=name)


def _nearest_mode(mode: str, name: str, path: str | os.PathLike[str]) -> str:
    candidates = {
        "1": ("L", "RGB"),
        "L": ("RGB",),
        "LA": ("RGBA",),
        "P": ("RGB",),
        "PA": ("RGBA",),
        "RGB": ("P",),
        "RGBA": ("PA",),
        "CMYK": ("RGB", "P"),
        "YCbCr": ("RGB", "P"),
        "HSV": ("RGB", "P"),
    }[mode]
    for candidate in candidates:
        if candidate in _MODES[name]:
            return candidate
    raise InputError(f"{path}: {name} holds no transparency and the image uses it; write PNG, WebP or TIFF")


def _keeps_orientation(form: Form, name: str) -> bool:
    if name not in ("PNG", "JPEG", "WEBP") or not form.exif:
        return False
    exif = parse_exif(form.exif)
    return exif is not None and exif.get(ORIENTATION_TAG, 1) == form.orientation


def write_picture(picture: Picture, path: str | os.PathLike[str], *, format: str | None = None) -> None:
    """Write a picture to a file, in its own mode and depth where the format has them; whole, or not at all.

    Args:
        picture: one picture (B = 1).
        path: its suffix decides the format, unless `format` does ("png", "jpg", …).

    Raises:
        InputError: the format cannot hold the picture, or the file cannot be written; an existing file stays as it was.
    """
    form = form_for(picture, path, picture.size, format)
    name = form.format
    with atomic_file(path) as file:
        if picture.form.mode == "CMYK" and form.mode != "CMYK" and picture.form.icc:
            picture = replace(picture, rgb=cmyk_to_srgb(picture), black=None)
        picture = picture.with_form(form)
        if form.depth == 16:
            samples = to_samples(picture)
            writer = row_writer(file, form, samples.shape[1], samples.shape[0])
            writer.write(samples)
            writer.finish()
        elif name == "BMP" and form.mode == "RGBA":
            write_bmp_rgba(file, to_samples(picture))
        else:
            image = to_pil(picture)
            try:
                _save(image, file, name, save_options(form, image))
            except OSError:
                raise
            except Exception as error:  # encoders trip over third-party metadata in as many ways as decoders
                raise InputError(f"{path}: cannot be encoded as {name} ({error})") from error


def _save(image: Image.Image, file: IO[bytes], name: str | None, options: dict[str, Any]) -> None:
    try:
        image.save(file, format=name, **options)
    except OSError as error:
        # The buffer that Pillow has for the shortest JPEG code is too small for noise. A full disk has a number.
        if error.errno is not None or not options.get("optimize"):
            raise
        file.seek(0)
        file.truncate()
        image.save(file, format=name, **(options | {"optimize": False}))


def row_writer(file: IO[bytes], form: Form, width: int, height: int) -> RowWriter:
    """A writer of rows for a form of 8 or 16 bits in PNG or TIFF, with the form's profile and metadata."""
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[form.mode]
    form, dpi = without_rotation(form), dots_per_inch(form)
    if form.format == "PNG":
        exif, text = resized_exif(form, (width, height)), texts(form)
        chunks = color_chunks(form)
        return PNGWriter(
            file, width, height, channels, depth=form.depth, icc=form.icc, exif=exif, text=text, dpi=dpi, chunks=chunks
        )
    return TIFFWriter(file, width, height, channels, depth=form.depth, icc=form.icc, dpi=dpi)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when everything was written, and leaves nothing behind otherwise.

    Raises:
        InputError: the folder cannot be made, no permission, a full disk, or pixels that the format refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write, this is a folder")
    try:
        with atomic_path(path) as part, open(part, "w+b") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
