"""Reading 8-bit images for scoring, the bicubic row, and the sheet of pictures beside a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from morsr import imaging
from morsr.errors import InputError


def read_rgb(path: Path) -> np.ndarray:
    """Decode an 8-bit gray or RGB file to (H, W, 3) uint8, gray repeated, EXIF rotation applied.

    Raises:
        InputError: the file cannot be decoded, or holds other than 8 bits, alpha, or several pages.
    """
    picture = imaging.read(path)
    if picture.samples.dtype != np.uint8 or picture.alpha is not None:
        got = "transparency" if picture.alpha is not None else f"{picture.samples.dtype} samples"
        raise InputError(f"{path.name}: expected 8-bit gray or RGB, got {got}")
    return picture.rgb8


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
    lines: Sequence[Mapping[str, np.ndarray]], *, crop: int = 160, zoom: int = 2, corner_of: str | None = None
) -> np.ndarray:
    """Paste images into one sheet (H, W, 3) uint8, a line per image and a column per method.

    Args:
        lines: caption to (H, W, 3) uint8; all columns of a line have one size.
        crop: side in px of the window that is shown, where its image has most detail.
        zoom: every pixel becomes zoom x zoom.
        corner_of: caption of the image that places the window; None is the last column.
    """
    from PIL import Image, ImageDraw

    strips = []
    for line in lines:
        row, column = detailed_corner(line.get(corner_of or "", list(line.values())[-1]), crop)
        cells = []
        for name, image in line.items():
            window = image[row : row + crop, column : column + crop].repeat(zoom, axis=0).repeat(zoom, axis=1)
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
