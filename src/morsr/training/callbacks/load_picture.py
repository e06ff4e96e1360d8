"""One picture of how the routed ranks are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from morsr.functional.layer_names import block_of, flow_order

_LABELS = 48  # more layers than these are labelled by block


def load_picture(
    load_LN: Tensor, mass_L: Tensor, zero_by_severity: Tensor, names: Sequence[str], num_zero: int, *, title: str
) -> np.ndarray:
    """Draw the load of every slot by layer, the gate mass by layer, and the share of zero slots by severity.

    Args:
        load_LN: load of each slot over the even load (L, N), real slots first, then zero slots.
        mass_L: sum of the routed gates, mean over images (L,).
        zero_by_severity: mean share of zero slots in equal bins of severity over [0, 1]; NaN where no image is.
        names: of the layers.
        num_zero: how many of the last slots are zero slots.
        title: of the picture.

    Returns:
        uint8 image (H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = flow_order(names)
    names = [names[index] for index in order]
    load, mass = (values.double().cpu().numpy()[order] for values in (load_LN, mass_L))
    layers, slots = load.shape
    # A Figure without pyplot: no window system is touched and a user's own backend stays as it is.
    figure = Figure(figsize=(16, min(5 + 0.11 * layers, 13)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    grid = figure.add_gridspec(1, 3, width_ratios=(3, 0.8, 1))
    heat: Any = figure.add_subplot(grid[0])
    image = heat.imshow(
        np.log2(load.clip(0.25, 4)), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest",
        extent=(0, slots, layers, 0),
    )  # fmt: skip
    heat.set_title("Load of each slot over the even load", fontsize=11)
    heat.set_xlabel(f"slot ({slots - num_zero} routed" + (f", then {num_zero} zero slots)" if num_zero else ")"))
    if num_zero:
        heat.axvline(slots - num_zero, color="black", linewidth=1)
    _label_layers(heat, names)
    scale = figure.colorbar(image, ax=heat, location="left", shrink=0.5, extend="both", pad=0.02)
    scale.set_ticks([-2, -1, 0, 1, 2], labels=["≤ 1/4", "1/2", "1 (even)", "2", "≥ 4"])

    side: Any = figure.add_subplot(grid[1], sharey=heat)
    side.barh(np.arange(layers) + 0.5, mass, height=1, color="#4c72b0")
    side.set_xlim(left=0)
    side.set_xlabel("gate mass")
    side.tick_params(axis="y", labelleft=False)
    bars: Any = figure.add_subplot(grid[2])
    share = zero_by_severity.double().cpu().numpy()
    width = 1 / len(share)
    bars.bar((np.arange(len(share)) + 0.5) * width, np.nan_to_num(share), width=0.9 * width, color="#55a868")
    bars.axhline(num_zero / slots, color="black", linewidth=1, linestyle="--", label="even")
    bars.set_xlim(0, 1)
    bars.set_ylim(0, max(0.05, float(np.nanmax([*share, num_zero / slots])) * 1.2))
    bars.set_xlabel("severity of the image")
    bars.set_ylabel("share of zero slots")
    bars.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _label_layers(axis: Any, names: Sequence[str]) -> None:
    """Every layer by its name where there is room, else every block by its own."""
    if len(names) <= _LABELS:
        axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
        return
    blocks = [block_of(name) for name in names]
    starts = [row for row in range(len(names)) if row == 0 or blocks[row] != blocks[row - 1]]
    ends = [*starts[1:], len(names)]
    for start in starts[1:]:
        axis.axhline(start, color="black", linewidth=0.6)
    # Names of blocks lower than a line of text would print over each other.
    shown = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start >= len(names) / 50]
    axis.set_yticks([(start + end) / 2 for start, end in shown], [blocks[start] for start, _ in shown], fontsize=8)
