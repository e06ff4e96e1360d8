"""Pictures side by side on one captioned sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

HEADER, GAP = 16, 4  # pixels for the captions, and between two pictures


def side_by_side(lines: Sequence[Mapping[str, np.ndarray]], *, crop: int = 160, zoom: int = 2) -> np.ndarray:
    """Paste images into one sheet (H, W, 3) uint8, a line per image and a column per caption.

    Args:
        lines: caption to (H, W, 3) uint8; all columns of a line have one size.
        crop: side in px of the window that is shown, where the last column has most detail.
        zoom: every pixel becomes zoom x zoom.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, strips = ImageFont.load_default(size=12), []
    for line in lines:
        row, column = detailed_corner(list(line.values())[-1], crop)
        cells = []
        for name, image in line.items():
            window = image[row : row + crop, column : column + crop].repeat(zoom, axis=0).repeat(zoom, axis=1)
            cell = Image.new("RGB", (window.shape[1] + GAP, window.shape[0] + HEADER + GAP), "white")
            cell.paste(Image.fromarray(window), (0, HEADER))
            ImageDraw.Draw(cell).text((2, 0), name, fill="black", font=font)
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
