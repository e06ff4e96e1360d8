"""Figures: pictures side by side on a captioned sheet, and heat maps of how often slots are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from morsr.functional.layer_names import block_of, flow_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def load_figure(
    panels: Mapping[str, Tensor], layers: Sequence[str], num_zero: int, *, label: str, middle: float | None = 0.0
) -> Figure:
    """Draw maps of layers by slots beside one another, on one scale.

    Args:
        panels: title to values (L, N), in even loads; zero slots last.
        layers: names of the L layers.
        num_zero: how many of the last slots are zero slots.
        label: of the scale.
        middle: value of a diverging scale's white middle: 1 for loads, which are never negative, 0 for differences of
            loads; None for gates: white is 0, darker is more.
    """
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure

    order = flow_order(layers)
    blocks = [block_of(layers[row]) for row in order]
    starts = [row for row, block in enumerate(blocks) if row == 0 or block != blocks[row - 1]]
    # Without pyplot no window system is touched, and a user's own backend stays as it is.
    figure = Figure(figsize=(2.4 * len(panels) + 2.5, max(3.5, min(9, len(layers) / 9))), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colors, scale = "Reds", Normalize(0, 2)
    if middle is not None:
        colors, scale = "RdBu_r", TwoSlopeNorm(middle, vmin=0 if middle else -2, vmax=middle + 2)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        slots = values.shape[1]
        shown = axis.imshow(values.cpu()[order], aspect="auto", cmap=colors, norm=scale, interpolation="nearest")
        axis.axvline(slots - num_zero - 0.5, color="black", linewidth=0.8)
        axis.set(title=title, xlabel=f"{slots - num_zero} routed | {num_zero} zero slots", xticks=[])
    axes[0].set_yticks(starts, [blocks[row] for row in starts], fontsize=7)
    figure.colorbar(shown, ax=axes, label=label, extend="both" if middle == 0 else "max")
    return figure


def pixels_of(figure: Figure) -> np.ndarray:
    """A drawn figure as uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
