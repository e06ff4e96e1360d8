"""What goes into a picture's file beside its pixels: profile, EXIF data, XMP, text, resolution, colour."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Any

from PIL import Image, PngImagePlugin

from morsr.models.picture import ORIENTATION_TAG, Form, parse_exif, resized_exif

JPEG_QUALITY = 95
_XMP_ROTATION = r"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]"""
_JPEG_SEGMENT = 65_000
"""Bytes of metadata that one segment of a JPEG holds, with room for its name."""


def without_rotation(form: Form) -> Form:
    """The form with EXIF data and XMP that claim no rotation, if its pixels are written upright."""
    if form.orientation != 1:
        return form
    kept = {key: value for key, value in form.info.items() if not _turns_as_text(key, value)}
    form = replace(form, info={key: _without_xmp_rotation(key, value) for key, value in kept.items()})
    if not form.exif:
        return form
    exif = parse_exif(form.exif)
    if exif is None:
        return replace(form, exif=None)  # what cannot be read here might still turn the picture in another program
    if exif.get(ORIENTATION_TAG, 1) == 1:
        return form
    exif[ORIENTATION_TAG] = 1
    return replace(form, exif=exif.tobytes())


def _without_xmp_rotation(key: str, value: Any) -> Any:
    """A piece of a form's info; of XMP with the orientation 1, which programs take where EXIF data have none."""
    if key == "xmp" and isinstance(value, bytes):
        return re.sub(_XMP_ROTATION.encode(), rb"\g<1>1", value)
    if key == "XML:com.adobe.xmp" and isinstance(value, str):
        return re.sub(_XMP_ROTATION, r"\g<1>1", value)
    return value


def _turns_as_text(key: str, value: Any) -> bool:
    """Whether a piece of a form's info is EXIF data as PNG text, as ImageMagick writes them, that claim a rotation."""
    if key not in ("Raw profile type exif", "Raw profile type APP1") or not isinstance(value, str):
        return False
    try:
        exif = parse_exif(bytes.fromhex("".join(value.split("\n")[3:])))
    except ValueError:
        return False  # other programs cannot read it either
    return exif is not None and exif.get(ORIENTATION_TAG, 1) != 1


def texts(form: Form) -> dict[str, str]:
    """PNG's texts by their keywords."""
    return {key: value for key, value in form.info.items() if isinstance(key, str) and isinstance(value, str)}


def color_chunks(form: Form) -> list[tuple[bytes, bytes]]:
    """PNG's own words on colour, which a picture without an ICC profile may have."""
    info, chunks = form.info, []
    if form.icc:
        return []
    if info.get("srgb") in (0, 1, 2, 3):
        chunks.append((b"sRGB", bytes([info["srgb"]])))
    if isinstance(info.get("gamma"), float) and 0 < info["gamma"] < 40000:
        chunks.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 100000))))
    chromaticity = info.get("chromaticity")
    if isinstance(chromaticity, tuple) and len(chromaticity) == 8 and all(0 <= value < 40000 for value in chromaticity):
        chunks.append((b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in chromaticity))))
    return chunks


def dots_per_inch(form: Form) -> tuple[float, float] | None:
    """Horizontal and vertical resolution, where the form has one that makes sense."""
    try:
        x, y = (float(value) for value in form.info["dpi"])
        return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def save_options(form: Form, image: Image.Image) -> dict[str, Any]:
    """What Pillow's `save` is to be given for an image in the form's format: metadata, and the quality of codecs."""
    options: dict[str, Any] = {}
    form = without_rotation(form)
    exif = resized_exif(form, image.size)
    if form.icc and form.format != "GIF":
        options["icc_profile"] = form.icc
    if form.format in ("PNG", "JPEG", "WEBP") and exif and (form.format != "JPEG" or len(exif) <= _JPEG_SEGMENT):
        options["exif"] = exif
    if (dpi := dots_per_inch(form)) and form.format in ("PNG", "JPEG", "TIFF", "BMP"):
        options["dpi"] = dpi
    xmp = form.info.get("xmp")
    if form.format in ("JPEG", "WEBP") and isinstance(xmp, bytes) and len(xmp) <= _JPEG_SEGMENT:
        options["xmp"] = xmp
    if form.format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in texts(form).items():
            options["pnginfo"].add_itxt(key[:79], value)
        for name, data in color_chunks(form):
            options["pnginfo"].add(name, data)
    elif form.format == "JPEG":
        options |= {"quality": JPEG_QUALITY, "subsampling": 0, "optimize": True}
        if isinstance(form.info.get("comment"), bytes):
            options["comment"] = form.info["comment"]
    elif form.format == "WEBP":
        options |= {"lossless": True} if form.info.get("lossless") else {"quality": JPEG_QUALITY}
    elif form.format == "TIFF":
        # JPEG inside TIFF would lose quality a second time, and fax codes hold only two colours.
        kept = form.info.get("compression") in ("raw", "tiff_lzw", "packbits")
        options["compression"] = form.info["compression"] if kept else "tiff_adobe_deflate"
        if options["compression"] == "raw":
            options["compression"] = None
    return options
