"""One upright picture, colours beside alpha, and the way back to what it came as.

Colours are gray or RGB. Palette, 1-bit, CMYK, YCbCr and similar images become gray or RGB when they are read.
Pixels that are fully transparent take the colour of the nearest visible pixel, so that nothing hidden has an effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from morsr.errors import InputError
from morsr.functional.color import luma
from morsr.functional.resample import unit_range

ORIENTATION = 0x0112
LOSSY_GRAY = 3 / 255
"""Largest difference between the channels of a gray image that a lossy format stored in colour."""

_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF; the second is 0 where white is 0


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a file says beside its pixels: profile, EXIF, XMP and IPTC data, pixels per inch, PNG texts by keyword."""

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An upright picture.

    Attributes:
        pixels: (H, W, 1) gray or (H, W, 3) RGB; uint8, uint16, or float32 in [0, 1].
        alpha: (H, W) of the same type, or None.
        kind: what it came as, and what `to_kind` returns.
        format: Pillow's name of the file format, or None.
        lossless: whether the file's compression was lossless; False for JPEG and most WebP.
        notes: what the file said beside its pixels.
        array: shape rank and dtype of a numpy array.
    """

    pixels: NDArray[Any]
    alpha: NDArray[Any] | None = None
    kind: Literal["file", "pil", "numpy"] = "file"
    format: str | None = None
    lossless: bool = True
    notes: Notes = field(default_factory=Notes)
    array: tuple[int, Any] = (3, np.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the samples."""
        return self.pixels.dtype

    @cached_property
    def gray(self) -> bool:
        """Whether no pixel has a colour; its restored image has none either."""
        tolerance = 0.0 if self.lossless else LOSSY_GRAY * _white(self.dtype)
        return is_gray(self.pixels, tolerance)

    @property
    def planes(self) -> Tensor:
        """Colours (1, 3, H, W) in their own type; gray is repeated without a copy."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)

    @property
    def rgb(self) -> Tensor:
        """Colours (1, 3, H, W), float32 in [0, 1]."""
        return unit_range(self.planes).contiguous()

    @property
    def alpha_plane(self) -> Tensor | None:
        """Alpha (1, 1, H, W), float32 in [0, 1], or None."""
        return None if self.alpha is None else unit_range(torch.from_numpy(self.alpha))[None, None]

    @property
    def rgb8(self) -> NDArray[np.uint8]:
        """Colours (H, W, 3) with 8 bits; alpha is dropped."""
        return np.repeat(to_uint8(self.pixels), 3 // self.pixels.shape[2], axis=2)

    @property
    def channels(self) -> int:
        """Of a file's samples: colours and alpha."""
        return self.pixels.shape[2] + (self.alpha is not None)

    @property
    def transparent(self) -> bool:
        """Whether some pixel is not opaque."""
        return self.alpha is not None and bool((to_uint8(self.alpha) < 255).any())

    def samples(self, rgb: Tensor, alpha: Tensor | None = None) -> NDArray[Any]:
        """Restored rows as samples of this picture's own type and channels, alpha last.

        Args:
            rgb: (1, 3, h, W), clamped to [0, 1]; the result has no colour if the picture has none.
            alpha: (1, 1, h, W) if and only if the picture has alpha.
        """
        if (alpha is None) != (self.alpha is None):
            raise InputError("expected alpha with the colours if and only if the picture has alpha")
        if self.gray:
            rgb = luma(rgb).expand(-1, self.pixels.shape[2], -1, -1)
        planes = rgb if alpha is None else torch.cat([rgb, alpha], dim=1)
        values = planes[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        white = _white(self.dtype)
        return values.astype(self.dtype) if white == 1 else np.rint(values * white).astype(self.dtype)

    def restored(self, rgb: Tensor, alpha: Tensor | None = None) -> Picture:
        """This picture with restored pixels; arguments as for `samples`."""
        samples = self.samples(rgb, alpha)
        return replace(
            self, pixels=samples[..., : self.pixels.shape[2]], alpha=None if alpha is None else samples[..., -1]
        )

    def stacked(self) -> NDArray[Any]:
        """The picture's samples (H, W, C), alpha last."""
        return self.pixels if self.alpha is None else np.concatenate([self.pixels, self.alpha[..., None]], axis=2)

    def to_kind(self) -> Any:
        """The picture as what it came as: an array of the same rank and dtype, or a PIL image.

        Pillow has no 16-bit colours and no floating-point colours: such a file comes back as an array (H, W, C).
        """
        samples = self.stacked()
        if self.kind == "numpy":
            rank, dtype = self.array
            samples = samples.astype(dtype, copy=False)
            return samples[..., 0] if rank == 2 else samples
        return samples if self.dtype != np.uint8 and samples.shape[2] > 1 else to_pil(self)


def from_array(array: NDArray[Any]) -> Picture:
    """A picture of an array (H, W) or (H, W, C): gray, gray and alpha, RGB or RGBA; uint8, uint16 or floats in [0, 1].

    Raises:
        InputError: another shape or type, no pixel, or values out of range.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise InputError(f"array: expected shape (H, W) or (H, W, C) with 1 to 4 channels, got {array.shape}")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise InputError(f"array: expected uint8, uint16 or floats in [0, 1], got {array.dtype}")
    return from_samples(array, kind="numpy", array=(array.ndim, array.dtype))


def from_samples(samples: NDArray[Any], orientation: int = 1, **about: Any) -> Picture:
    """A picture of stored samples (H, W) or (H, W, C); floats are checked, hidden pixels filled.

    Args:
        samples: gray, gray and alpha, RGB or RGBA.
        orientation: EXIF's, 1 to 8; the picture is turned upright.
        about: the other attributes of `Picture`.
    """
    if 0 in samples.shape:
        raise InputError(f"expected at least one pixel, got shape {samples.shape}")
    if samples.dtype.kind == "f":
        low, high = float(samples.min()), float(samples.max())
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
            raise InputError(f"expected finite values in [0, 1], got {low:.4g} to {high:.4g}")
        samples = samples.astype(np.float32).clip(0, 1)
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    samples = orient(samples[..., None] if samples.ndim == 2 else samples, orientation)
    if samples.shape[2] in (1, 3):
        return Picture(pixels=np.ascontiguousarray(samples), **about)
    alpha = np.ascontiguousarray(samples[..., -1])
    return Picture(pixels=fill_hidden(np.ascontiguousarray(samples[..., :-1]), alpha), alpha=alpha, **about)


def fill_hidden(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Give pixels whose alpha is 0 the colour of the nearest visible pixel; nobody has seen their own."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return pixels
    import cv2

    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.empty((int(labels.max()) + 1, pixels.shape[2]), pixels.dtype)
    colours[labels[~hidden]] = pixels[~hidden]
    filled = pixels.copy()
    filled[hidden] = colours[labels[hidden]]
    return filled


def is_gray(pixels: NDArray[Any], tolerance: float = 0.0) -> bool:
    """Whether the channels (H, W, C) of every pixel differ by `tolerance` at most."""
    if pixels.shape[2] == 1:
        return True
    for start in range(0, len(pixels), 256):  # most images show a colour early
        part = pixels[start : start + 256]
        if (part.max(axis=2).astype(np.float32) - part.min(axis=2) > tolerance).any():
            return False
    return True


def to_uint8(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples of any type with 8 bits, rounded."""
    white = _white(values.dtype)
    return values if white == 255 else np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)


def orient(samples: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn stored samples (H, W, ...) of an EXIF orientation upright."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples[:, ::-1] if orientation in (2, 3, 6, 7) else samples


def from_pil(image: Image.Image, kind: Literal["file", "pil"] = "pil") -> Picture:
    """A picture of a PIL image; its pixels are decoded before anything is asked that could swallow a decoder's error.

    Raises:
        InputError: several frames or pages, gray values outside 16 bits, floats outside [0, 1].
        Exception: anything else that a decoder of a damaged file raises.
    """
    orientation = stored_orientation(image)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # cameras append previews to a JPEG
    if frames > 1:
        raise InputError(f"the image has {frames} frames or pages; split it and give one at a time")
    tags = getattr(image, "tag_v2", {})
    image.load()
    info = image.info
    about = {
        "kind": kind,
        "format": "JPEG" if image.format == "MPO" else image.format,
        "lossless": image.format not in ("JPEG", "MPO", "WEBP"),
    }
    icc = info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        samples = _deep_gray(np.asarray(image), tags)
        clear = info.get("transparency")
        if isinstance(clear, int) and samples.dtype == np.uint16:  # PNG names one gray value that is not seen
            samples = np.stack([samples, np.where(samples == clear, 0, 65535).astype(np.uint16)], axis=-1)
    else:
        gray = image.mode in ("1", "L", "LA", "La")
        if image.mode in ("CMYK", "LAB"):
            icc = None  # does not describe the RGB that comes of it
        mode = ("LA" if gray else "RGBA") if image.has_transparency_data else ("L" if gray else "RGB")
        samples = np.array(image if image.mode == mode else image.convert(mode))
        if image.mode == "P" and mode == "RGBA" and samples[..., 3].min() == 255:
            samples = samples[..., :3]  # a palette may name a transparent colour that no pixel has
    xmp = info.get("xmp")
    xmp = xmp if isinstance(xmp, bytes) else None
    notes = Notes(icc=icc, exif=info.get("exif"), xmp=xmp, dpi=_dpi(info.get("dpi")))
    # Pillow turns a TIFF upright while it decodes.
    return from_samples(samples, 1 if image.format == "TIFF" else orientation, notes=notes, **about)


def _deep_gray(samples: NDArray[Any], tags: Mapping[int, Any]) -> NDArray[Any]:
    """Gray of more than 8 bits as uint16 or float with black at 0; Pillow leaves it as a TIFF stores it."""
    inverted = tags.get(_PHOTOMETRIC) == 0
    if samples.dtype.kind == "f":
        return 1 - samples if inverted else samples
    if tags.get(_BITS) == (12,):
        raise InputError("12-bit samples are not read; save it with 16 bits")
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 65535:
        raise InputError(f"expected gray values of 16 bits, got {low} to {high}")
    return (65535 - samples if inverted else samples).astype(np.uint16)


def stored_orientation(image: Image.Image) -> int:
    """The orientation (1 to 8) by the EXIF data or the TIFF tag of an opened image, without decoding it."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        tags = parse_exif(image.info.get("exif"))
    value = tags.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def parse_exif(data: Any) -> Image.Exif:
    """EXIF data as a table; an empty one if they cannot be parsed, which is no reason to refuse a photograph."""
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(data if isinstance(data, bytes) else b"")
            len(exif), exif.get(ORIENTATION)  # Pillow parses when it is asked
            return exif
        except Exception:  # third-party EXIF breaks its parser in many ways
            return Image.Exif()


def upright_exif(data: bytes | None) -> bytes | None:
    """EXIF data that claim no rotation; dropped if they cannot be changed and might claim one."""
    exif = parse_exif(data)
    if data is None or exif.get(ORIENTATION, 1) == 1:
        return data
    exif[ORIENTATION] = 1
    try:
        return exif.tobytes()
    except Exception:  # what could be read cannot always be written again
        return None


def to_pil(picture: Picture) -> Image.Image:
    """An 8-bit picture, or gray of any depth, as a PIL image with profile, EXIF, XMP and resolution in its `info`."""
    samples = picture.stacked()
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    notes = picture.notes
    found = {"icc_profile": notes.icc, "exif": upright_exif(notes.exif), "xmp": notes.xmp, "dpi": notes.dpi}
    image.info.update({name: value for name, value in found.items() if value}, **notes.texts)
    return image


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(part) for part in value)
        return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _white(dtype: np.dtype[Any]) -> float:
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
