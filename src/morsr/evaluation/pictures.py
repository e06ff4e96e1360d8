"""Side-by-side crops: one line per image, one column per method, so that the eye can check the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from morsr.errors import InputError

_MARGIN, _CAPTION = 4, 16


def detailed_corner(image: np.ndarray, crop: int) -> tuple[int, int]:
    """Top left corner (row, column) of the crop x crop window of (H, W, 3) uint8 with the most gradient energy."""
    gray = image.astype(np.float64).mean(axis=-1)
    down, across = np.gradient(gray) if min(gray.shape) > 1 else (np.zeros_like(gray), np.zeros_like(gray))
    total = np.pad(np.cumsum(np.cumsum(down**2 + across**2, axis=0), axis=1), ((1, 0), (1, 0)))
    high, wide = min(crop, gray.shape[0]), min(crop, gray.shape[1])
    window = total[high:, wide:] - total[:-high, wide:] - total[high:, :-wide] + total[:-high, :-wide]
    row, column = np.unravel_index(int(window.argmax()), window.shape)
    return int(row), int(column)


def side_by_side(
    lines: Sequence[Mapping[str, np.ndarray]], *, crop: int | None = 160, zoom: int = 2, corner_of: str | None = None
) -> np.ndarray:
    """Paste images of equal size into one sheet, with the names as captions.

    Args:
        lines: one mapping per line, caption to (H, W, 3) uint8; all columns of a line have one size.
        crop: side in px of the window that is shown of each line, or None for whole images.
        zoom: every pixel becomes zoom x zoom.
        corner_of: caption whose image decides where the window lies (most detail); None is the last column.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: no images, images of different sizes in one line, or other than (H, W, 3) uint8.
    """
    from PIL import Image, ImageDraw

    if not lines or not all(lines):
        raise InputError("side_by_side: expected at least one line with at least one image")
    for line in lines:
        shapes = {name: (image.shape, str(image.dtype)) for name, image in line.items()}
        shape, kind = next(iter(shapes.values()))
        if len(set(shapes.values())) > 1 or kind != "uint8" or len(shape) != 3 or shape[2] != 3:
            raise InputError(f"side_by_side: expected (H, W, 3) uint8 images of one size in a line, got {shapes}")
    strips = []
    for line in lines:
        deciding = line.get(corner_of) if corner_of else None
        deciding = list(line.values())[-1] if deciding is None else deciding
        row, column = detailed_corner(deciding, crop) if crop else (0, 0)
        high, wide = (min(crop, side) if crop else side for side in deciding.shape[:2])
        cells = []
        for name, image in line.items():
            window = image[row : row + high, column : column + wide].repeat(zoom, axis=0).repeat(zoom, axis=1)
            cell = Image.new("RGB", (window.shape[1] + _MARGIN, window.shape[0] + _CAPTION), "white")
            cell.paste(Image.fromarray(window), (0, _CAPTION))
            ImageDraw.Draw(cell).text((2, 2), name, fill="black")
            cells.append(np.asarray(cell))
        strips.append(np.concatenate(cells, axis=1))
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate(
        [np.pad(s, ((0, _MARGIN), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    )
