"""Reading images for scoring: what a file holds is checked before any of its pixels count."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from morsr.errors import InputError
from morsr.functional.checksums import IMAGE_FORMATS, check_png

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_KINDS = {"L": "gray", "1": "gray", "RGB": "RGB", "P": "RGB", "RGBA": "RGBA", "LA": "gray with alpha", "CMYK": "CMYK"}
_KINDS |= {"I;16": "gray", "I;16B": "gray", "I": "gray", "F": "gray", "PA": "RGBA"}
_ORIENTATION, _BITS_PER_SAMPLE = 274, 258
_PNM_MAXIMUM = re.compile(rb"P[2356]" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" * 3)


@dataclass(frozen=True)
class ImageHeader:
    """What the head of an image file says.

    Attributes:
        path: the file.
        width, height: in px, after EXIF rotation.
        kind: of channels; a transparent colour or palette counts as alpha.
        bits: per channel.
        frames: of an animation, or pages.
    """

    path: Path
    width: int
    height: int
    kind: str
    bits: int
    frames: int = 1

    @property
    def size(self) -> str:
        """Width x height as text."""
        return f"{self.width}x{self.height}"


def read_header(path: Path) -> ImageHeader:
    """Read the head of an image file.

    Raises:
        InputError: the file cannot be opened as an image.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # The base class's method: that of PNG files would decode the whole image first.
            if Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8):  # turned by a quarter
                width, height = height, width
            kind = _KINDS.get(image.mode, image.mode)
            if "transparency" in image.info:
                kind = {"gray": "gray with alpha", "RGB": "RGBA"}.get(kind, kind)
            # Cameras append previews to a JPEG; the photograph is the first picture of such an MPO file.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            return ImageHeader(path, width, height, kind, _bits(path, image), frames)
    except Exception as error:  # decoders of broken files raise anything, and Pillow its own for too many pixels
        raise InputError(f"{path.name}: cannot be read as an image ({error})") from error


def read_rgb(path: Path) -> np.ndarray:
    """Decode an 8-bit gray or RGB file to (H, W, 3) uint8, gray repeated, EXIF rotation applied.

    Raises:
        InputError: the file cannot be decoded, holds more than 8 bits, or other channels than gray or RGB.
    """
    from PIL import Image, ImageOps

    header = read_header(path)
    if problem := unusable(header):
        raise InputError(problem)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.format == "PNG":
                check_png(image.fp)
            image.load()
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise InputError(f"{path.name}: cannot be decoded ({error})") from error


def unusable(header: ImageHeader) -> str:
    """Why a file cannot be scored on its own, or an empty text."""
    if header.frames > 1:
        return f"{header.path.name}: {header.frames} frames or pages; split it and give one at a time"
    if header.bits != 8:
        return f"{header.path.name}: {header.bits} bits per channel; scores are defined on 8 bits, convert it first"
    if header.kind not in ("gray", "RGB"):
        return f"{header.path.name}: {header.kind} channels; expected gray or RGB, flatten it first"
    return ""


def mismatch(sr: ImageHeader, hr: ImageHeader, *, crop: bool) -> str:
    """Why two files cannot be compared, or an empty text. With `crop`, different sizes are no reason."""
    names = f"{sr.path.name} against {hr.path.name}"
    if max(sr.frames, hr.frames) > 1:
        return unusable(sr) or unusable(hr)
    if sr.bits != hr.bits:
        return f"{names}: {sr.bits}-bit against {hr.bits}-bit"
    if sr.kind != hr.kind:
        return f"{names}: {sr.kind} against {hr.kind}"
    if (sr.width, sr.height) != (hr.width, hr.height) and not crop:
        return f"{names}: {sr.size} against {hr.size} px (crop both to the common size with --crop)"
    return ""


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float().div(255)


def to_uint8(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] to (H, W, 3) uint8, clamped and rounded."""
    return image[0].detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def _bits(path: Path, image: object) -> int:
    # Pillow opens 16-bit RGB of PNG and PPM as 8-bit RGB without a word, so the depth is read from the file.
    if getattr(image, "format", "") == "PNG":
        with path.open("rb") as stream:
            head = stream.read(26)
        depth, color = struct.unpack(">BB", head[24:26])
        return 8 if color == 3 or depth < 8 else depth
    if getattr(image, "format", "") == "PPM" and getattr(image, "mode", "") in ("L", "I", "RGB"):
        with path.open("rb") as stream:
            found = _PNM_MAXIMUM.match(stream.read(65536))
        if found is None:
            raise ValueError("expected width, height and the largest value in the head of a PPM or PGM file")
        return max(8, int(found[3]).bit_length())
    tags = getattr(image, "tag_v2", None)
    if tags is not None and _BITS_PER_SAMPLE in tags:
        depth = tags[_BITS_PER_SAMPLE]
        return max(8, max(depth) if isinstance(depth, tuple) else depth)
    mode = getattr(image, "mode", "")
    return 32 if mode in ("I", "F") else 16 if mode.startswith("I;16") else 8
