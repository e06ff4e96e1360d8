"""Pictures side by side on one captioned sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

HEADER, GAP = 16, 4  # pixels for the captions, and between two pictures


def side_by_side(lines: Sequence[Mapping[str, np.ndarray]], *, crop: int = 160, zoom: int = 2) -> np.ndarray:
    """Paste images into one sheet (H, W, 3) uint8, a line per image and a column per caption.

    Args:
        lines: caption to (H, W, 3) uint8; all columns of a line have one size.
        crop: side in px of the window in the middle that is shown.
        zoom: every pixel becomes zoom x zoom.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, strips = ImageFont.load_default(size=12), []
    for line in lines:
        cells = []
        for name, image in line.items():
            row, column = (max(0, side - crop) // 2 for side in image.shape[:2])
            window = image[row : row + crop, column : column + crop].repeat(zoom, axis=0).repeat(zoom, axis=1)
            cell = Image.new("RGB", (window.shape[1] + GAP, window.shape[0] + HEADER + GAP), "white")
            cell.paste(Image.fromarray(window), (0, HEADER))
            ImageDraw.Draw(cell).text((2, 0), name, fill="black", font=font)
            cells.append(np.asarray(cell))
        strips.append(np.concatenate(cells, axis=1))
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips])
