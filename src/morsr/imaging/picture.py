"""One upright picture, what its file says beside the pixels, and the way from and to arrays and PIL images.

Colours are gray or RGB. Palette, 1-bit, CMYK, YCbCr and similar images become gray or RGB when they are read.
Pixels that are fully transparent take the colour of the nearest visible pixel, so that nothing hidden has an effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from morsr.errors import InputError
from morsr.functional.color import luma
from morsr.functional.resample import unit_range
from morsr.imaging.canvas import Canvas

_NAMES = {"icc_profile": "icc-profile-data", "exif": "exif-data", "xmp": "xmp-data", "dpi": "dpi"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An upright picture.

    Attributes:
        samples: (H, W, C): gray, gray and alpha, RGB or RGBA; uint8, uint16, or float32 in [0, 1].
        format: Pillow's name of the file format, or None.
        lossless: whether the file's compression was lossless; False for JPEG and most WebP.
        notes: profile, EXIF, XMP and IPTC data and PNG texts under libvips' names, and "dpi", pixels per inch.
        canvas: what holds the samples, where their memory can be given back while they are written.
    """

    samples: NDArray[Any]
    format: str | None = None
    lossless: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)
    canvas: Canvas | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.samples.shape[0], self.samples.shape[1]

    @property
    def pixels(self) -> NDArray[Any]:
        """Colours (H, W, 1) or (H, W, 3)."""
        return self.samples[..., : 3 if self.samples.shape[2] > 2 else 1]

    @property
    def alpha(self) -> NDArray[Any] | None:
        """Alpha (H, W), or None."""
        return self.samples[..., -1] if self.samples.shape[2] in (2, 4) else None

    @property
    def transparent(self) -> bool:
        """Whether some pixel is not opaque."""
        return self.alpha is not None and bool((to_uint8(self.alpha) < 255).any())

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

    def encoded(self, rgb: Tensor, alpha: Tensor | None = None) -> NDArray[Any]:
        """Restored rows as samples of this picture's own type and channels.

        Args:
            rgb: (1, 3, h, W), clamped to [0, 1].
            alpha: (1, 1, h, W) if the picture has alpha.
        """
        if self.pixels.shape[2] == 1:
            rgb = luma(rgb)
        planes = rgb if alpha is None else torch.cat([rgb, alpha], dim=1)
        values = planes[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        if self.samples.dtype.kind != "f":
            values = np.rint(values * _white(self.samples))
        return values.astype(self.samples.dtype)

    def like(self, source: Any) -> Any:
        """The picture as what it came as: an array of the same rank and dtype, else a PIL image.

        Pillow has no 16-bit colours and no floating-point colours: such a file comes back as an array (H, W, C).
        """
        if isinstance(source, np.ndarray):
            return self.samples.astype(source.dtype).reshape(*self.size, *self.samples.shape[2:][: source.ndim - 2])
        return self.samples if self.samples.dtype != np.uint8 and self.samples.shape[2] > 1 else to_pil(self)


def from_samples(samples: NDArray[Any], **about: Any) -> Picture:
    """A picture of an array (H, W) or (H, W, C): gray, gray and alpha, RGB or RGBA; uint8, uint16 or floats in [0, 1].

    Args:
        samples: of any byte order; hidden pixels are filled.
        about: the other attributes of `Picture`.

    Raises:
        InputError: another shape or type, no pixel, or values out of range.
    """
    shape, dtype = samples.shape, samples.dtype
    samples = np.require(samples, dtype.newbyteorder("="), ["C", "W"])  # as tensors that share its memory must be
    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4) or 0 in shape:
        raise InputError(f"expected shape (H, W) or (H, W, C) with 1 to 4 channels, got {shape}")
    if dtype.kind == "f":
        low, high = float(samples.min()), float(samples.max())
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
            raise InputError(f"expected finite values in [0, 1], got {low:.4g} to {high:.4g}")
        samples = samples.astype(np.float32).clip(0, 1)
    elif samples.dtype not in (np.uint8, np.uint16):
        raise InputError(f"expected uint8, uint16 or floats in [0, 1], got {dtype}; save it with 8 or 16 bits")
    return Picture(samples=fill_hidden(samples) if samples.shape[2] in (2, 4) else samples, **about)


def fill_hidden(samples: NDArray[Any]) -> NDArray[Any]:
    """Give pixels whose alpha is 0 the colour of the nearest visible pixel; nobody has seen their own."""
    hidden = samples[..., -1] == 0
    if not hidden.any() or hidden.all():
        return samples
    import cv2

    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    visible = np.empty((int(labels.max()) + 1, samples.shape[2]), samples.dtype)
    visible[labels[~hidden]] = samples[~hidden]
    filled = samples.copy()
    filled[hidden, :-1] = visible[labels[hidden], :-1]
    return filled


def to_uint8(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples of any type with 8 bits."""
    if samples.dtype == np.uint8:
        return samples
    return np.rint(samples * np.float32(255 / _white(samples))).astype(np.uint8)


def from_pil(image: Image.Image) -> Picture:
    """A picture of a PIL image; its pixels are decoded before anything is asked that could swallow a decoder's error.

    Raises:
        InputError: several frames or pages, gray values outside 16 bits, floats outside [0, 1].
        Exception: anything else that a decoder of a damaged file raises.
    """
    format, tags = image.format, getattr(image, "tag_v2", {})
    if format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:  # cameras append previews to a JPEG
        raise InputError(f"the image has {frames} frames or pages; split it and give one at a time")
    image.load()
    with contextlib.suppress(Exception):  # third-party EXIF breaks its parser in many ways
        image = ImageOps.exif_transpose(image)
    notes = {name: image.info[key] for key, name in _NAMES.items() if image.info.get(key)}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        samples = np.array(image)
        if tags and (tags.get(262) == 0 or tags.get(258) == (12,)):  # Pillow leaves such samples as they are stored
            raise InputError("gray with white at 0 and 12-bit samples are not read; save it with 16 bits")
        if samples.dtype.kind == "i" and 0 <= samples.min() <= samples.max() <= 65535:
            samples = samples.astype(np.uint16)
    else:
        if image.mode in ("CMYK", "LAB"):
            profile = notes.pop("icc-profile-data", None)  # does not describe the RGB that comes of it
            if profile and image.mode == "CMYK":
                srgb = ImageCms.createProfile("sRGB")
                with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a profile that does not fit counts as none
                    image = ImageCms.profileToProfile(image, BytesIO(profile), srgb, outputMode="RGB") or image
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        samples = np.array(image.convert(mode + "A" if image.has_transparency_data else mode))
    lossless = format not in ("JPEG", "MPO", "WEBP")
    return from_samples(samples, format="JPEG" if format == "MPO" else format, lossless=lossless, notes=notes)


def to_pil(picture: Picture) -> Image.Image:
    """An 8-bit picture, or gray of any depth, as a PIL image with profile, EXIF, XMP and resolution in its `info`."""
    samples = picture.samples
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    image.info = {key: picture.notes[name] for key, name in _NAMES.items() if name in picture.notes}
    with contextlib.suppress(Exception):  # EXIF data that cannot be parsed might claim a rotation, and are left out
        exif = Image.Exif()
        exif.load(image.info.pop("exif"))
        exif[ExifTags.Base.Orientation] = 1
        image.info["exif"] = exif.tobytes()
    return image


def _white(samples: NDArray[Any]) -> float:
    return 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
