"""Reading 8-bit images for scoring, and the bicubic row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morsr import imaging
from morsr.errors import InputError
from morsr.imaging import SUFFIXES as SUFFIXES
from morsr.imaging.files import opened
from morsr.imaging.listing import check_regular


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an 8-bit gray or RGB file, after EXIF rotation, from its head alone.

    Raises:
        InputError: the file is no image, holds other than 8 bits, transparency, or several pages.
    """
    with _opened(path):
        return imaging.image_size(path)


def read_rgb(path: Path) -> np.ndarray:
    """Decode an 8-bit gray or RGB file to (H, W, 3) uint8, gray repeated, EXIF rotation applied.

    Raises:
        InputError: as `image_size`, or the file cannot be decoded.
    """
    with _opened(path):
        return imaging.read_rgb(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_regular(path)
        with opened(path) as image:
            if problem := _unusable(image):
                raise InputError(f"{path.name}: expected one 8-bit gray or RGB image, got {problem}")
            yield image
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything, and Pillow its own for too many pixels
        raise InputError(f"{path.name}: cannot be read as an image ({error})") from error


def _unusable(image: Any) -> str:
    """Why a file cannot be scored, or an empty text."""
    # Cameras append previews to a JPEG; the photograph is the first picture of such an MPO file.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        return f"{frames} frames or pages"
    # Pillow opens 16-bit RGB as 8-bit RGB. What its decoder is asked for tells them apart: "RGB;16B", ("RGB", 65535).
    asked = image.tile[0][3] if image.tile else ""
    raw, most = (asked[0], asked[1]) if isinstance(asked, tuple) and len(asked) > 1 else (asked, 0)
    if ";16" in str(raw) or (image.format == "PPM" and most > 255):
        return "16 bits per channel"
    if image.mode not in ("1", "L", "P", "RGB"):
        return f"{image.mode} pixels"
    return "transparency" if "transparency" in image.info else ""


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float().div(255)


def to_uint8(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] to (H, W, 3) uint8, clamped and rounded."""
    return image[0].detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge (h, w, 3) uint8 by OpenCV's bicubic interpolation: the row that every table carries."""
    import cv2

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def side_by_side(
    lines: Sequence[Mapping[str, np.ndarray]], *, crop: int | None = 160, zoom: int = 2, corner_of: str | None = None
) -> np.ndarray:
    """Paste images into one sheet, a line per image and a column per method, so that the eye can check the table.

    Args:
        lines: caption to (H, W, 3) uint8; all columns of a line have one size.
        crop: side in px of the window that is shown, where its image has most detail; None for whole images.
        zoom: every pixel becomes zoom x zoom.
        corner_of: caption of the image that places the window; None is the last column.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: images of different sizes in one line.
    """
    from PIL import Image, ImageDraw

    strips = []
    for line in lines:
        if len({image.shape for image in line.values()}) != 1:
            raise InputError(f"side_by_side: expected images of one size, got {[i.shape for i in line.values()]}")
        deciding = line.get(corner_of or "", list(line.values())[-1])
        row, column = detailed_corner(deciding, crop) if crop else (0, 0)
        cells = []
        for name, image in line.items():
            window = image[row:, column:] if crop is None else image[row : row + crop, column : column + crop]
            window = window.repeat(zoom, axis=0).repeat(zoom, axis=1)
            cell = Image.new("RGB", (window.shape[1] + 4, window.shape[0] + 20), "white")
            cell.paste(Image.fromarray(window), (0, 16))
            ImageDraw.Draw(cell).text((2, 2), name, fill="black")
            cells.append(np.asarray(cell))
        strips.append(np.concatenate(cells, axis=1))
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips])


def detailed_corner(image: np.ndarray, crop: int) -> tuple[int, int]:
    """Top left corner (row, column) of the crop x crop window of (H, W, 3) uint8 with the most gradient energy."""
    import cv2

    gray = image.astype(np.float64).mean(axis=-1)
    down, across = np.gradient(gray) if min(gray.shape) > 1 else (np.zeros_like(gray), np.zeros_like(gray))
    total = cv2.integral(down**2 + across**2)
    high, wide = min(crop, gray.shape[0]), min(crop, gray.shape[1])
    window = total[high:, wide:] - total[:-high, wide:] - total[high:, :-wide] + total[:-high, :-wide]
    row, column = np.unravel_index(int(window.argmax()), window.shape)
    return int(row), int(column)
