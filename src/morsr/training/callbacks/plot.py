"""Pictures of how the ranks are used: a quick heat map for TensorBoard and a labelled plot for the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morsr.files import atomic_path
from morsr.functional.layer_names import block_of, flow_order
from morsr.functional.utilization import DEAD_BELOW

# Five stops of matplotlib's viridis, so that a heat map needs no figure.
_STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)
_FULL = 3.0  # loads from zero to three times the even one span the colours


def heat_map_image(load_LN: Tensor, num_zero: int, *, cell: tuple[int, int] = (6, 16)) -> np.ndarray:
    """Draw layers x slots as a plain picture: dark is unused, bright is three times the even load or more.

    Args:
        load_LN: share of choices (L, N), real experts first.
        num_zero: how many of the last slots are zero experts; a white line sets them apart.
        cell: height and width of one slot in pixels.

    Returns:
        uint8 image (H, W, 3).
    """
    relative = (load_LN * load_LN.shape[1] / _FULL).clamp(0, 1).cpu().numpy()
    stops = np.linspace(0, 1, len(_STOPS))
    colours = np.stack([np.interp(relative, stops, _STOPS[:, channel]) for channel in range(3)], axis=-1)
    image = colours.round().astype(np.uint8).repeat(cell[0], axis=0).repeat(cell[1], axis=1)
    if 0 < num_zero < load_LN.shape[1]:
        line = np.full((image.shape[0], 3, 3), 255, dtype=np.uint8)
        cut = (load_LN.shape[1] - num_zero) * cell[1]
        image = np.concatenate([image[:, :cut], line, image[:, cut:]], axis=1)
    return image


def utilization_plot(
    load_LN: Tensor,
    zero_share_by_severity: tuple[Tensor, Tensor],
    path: str | Path,
    *,
    num_zero: int,
    num_shared: int,
    top_k: int,
    expert_rank: int = 1,
    layer_names: Sequence[str] = (),
    title: str = "How the ranks are used",
) -> Path:
    """Write one labelled PNG: load by layer and slot, active ranks along the network, load profile, zero slots.

    Args:
        load_LN: share of choices (L, N), real experts first, then zero experts.
        zero_share_by_severity: severity (I,) and zero share (I,) of I images, both in [0, 1]; I may be 0.
        path: where the PNG goes.
        num_zero, num_shared, top_k, expert_rank: of the adapter.
        layer_names: L dotted names; their blocks order and label the rows.
        title: heading of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    load = load_LN.detach().double().cpu()
    layers, slots = load.shape
    if len(layer_names) == layers:
        order = flow_order(layer_names)
        load, layer_names = load[order], [layer_names[index] for index in order]
    # A Figure without pyplot: no window system is touched and a user's own backend stays as it is.
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1.15), height_ratios=(2, 1))
    heat = figure.add_subplot(grid[0, 0])
    ranks = figure.add_subplot(grid[0, 1], sharey=heat)
    profile = figure.add_subplot(grid[1, 0])
    zero = figure.add_subplot(grid[1, 1])

    _draw_heat(figure, heat, load.numpy() * slots, num_shared, num_zero)
    _label_blocks(heat, layer_names, layers)
    _draw_ranks(ranks, load[:, slots - num_zero :].sum(1).numpy(), num_shared, top_k * expert_rank)
    _draw_profile(profile, load, num_zero)
    _draw_zero(zero, *(values.detach().double().cpu().numpy() for values in zero_share_by_severity), num_zero, slots)  # type: ignore[arg-type,call-arg]
    path = Path(path)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)
    return path


def _draw_heat(figure: Any, axis: Any, relative: np.ndarray, num_shared: int, num_zero: int) -> None:
    layers, slots = relative.shape
    real = slots - num_zero
    gap = max(1, round(0.02 * (slots + num_shared)))
    start_routed = num_shared + gap if num_shared else 0
    start_zero = start_routed + real + gap
    image = axis.imshow(
        relative[:, :real],
        aspect="auto",
        vmin=0,
        vmax=_FULL,
        extent=(start_routed, start_routed + real, layers, 0),
        interpolation="nearest",
    )
    groups = [(f"routed: {real}", start_routed, real)]
    if num_zero:
        extent = (start_zero, start_zero + num_zero, layers, 0)
        axis.imshow(relative[:, real:], aspect="auto", vmin=0, vmax=_FULL, extent=extent, interpolation="nearest")
        groups.append((f"zero: {num_zero}", start_zero, num_zero))
    if num_shared:
        axis.axvspan(0, num_shared, color="0.75")
        axis.text(num_shared / 2, layers / 2, "always on", rotation=90, ha="center", va="center", fontsize=9)
        groups.insert(0, (f"shared: {num_shared}", 0, num_shared))
    axis.set_xlim(0, start_zero + num_zero if num_zero else start_routed + real)
    axis.set_ylim(layers, 0)
    axis.set_xticks([start + width / 2 for _, start, width in groups], [name for name, *_ in groups])
    axis.tick_params(axis="x", length=0)
    axis.set_title("Load of every slot, layer by layer from input to output", fontsize=11)
    colours = figure.colorbar(image, ax=axis, location="left", shrink=0.6, extend="max", pad=0.02)
    colours.set_label("load / even load  (0: never chosen, 1: even)")


def _label_blocks(axis: Any, layer_names: Sequence[str], layers: int) -> None:
    if len(layer_names) != layers:
        axis.set_ylabel("layer")
        return
    starts = [0]
    blocks = [block_of(name) for name in layer_names]
    starts += [row for row in range(1, layers) if blocks[row] != blocks[row - 1]]
    ends = [*starts[1:], layers]
    for start in starts[1:]:
        axis.axhline(start, color="white", linewidth=0.8)
    # Names of blocks lower than a line of text would print over each other.
    shown = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start >= layers / 40]
    axis.set_yticks([(start + end) / 2 for start, end in shown], [blocks[start] for start, _ in shown], fontsize=8)
    axis.tick_params(axis="y", length=0)


def _draw_ranks(axis: Any, zero_share_L: np.ndarray, num_shared: int, num_chosen: int) -> None:
    rows = np.arange(len(zero_share_L)) + 0.5
    routed = num_chosen * (1 - zero_share_L)
    axis.barh(rows, np.full(len(rows), num_shared), height=1, color="0.75", label="shared")
    axis.barh(rows, routed, left=num_shared, height=1, color="#21918c", label="routed")
    left = num_shared + routed
    axis.barh(rows, num_chosen * zero_share_L, left=left, height=1, color="#fde725", label="saved by zero slots")
    axis.set_xlim(0, num_shared + num_chosen)
    axis.set_xlabel("ranks per image")
    axis.set_title("Active ranks along the network", fontsize=11)
    axis.tick_params(axis="y", labelleft=False)
    axis.legend(loc="lower left", fontsize=8, framealpha=0.9)


def _draw_profile(axis: Any, load_LN: Tensor, num_zero: int) -> None:
    slots = load_LN.shape[1]
    real = slots - num_zero
    # Slot 5 of one layer has nothing to do with slot 5 of another, so each layer is sorted by itself.
    ordered = torch.cat(
        [load_LN[:, :real].sort(1, descending=True).values, load_LN[:, real:].sort(1, descending=True).values], dim=1
    )
    relative = (ordered * slots).numpy()
    places = np.arange(slots)
    colours = ["#21918c"] * real + ["#e0b000"] * num_zero
    axis.bar(places, relative.mean(0), color=colours, width=0.85)
    axis.vlines(places, relative.min(0), relative.max(0), color="0.25", linewidth=1)
    axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axis.text(real - 0.5, 1.04, "even", ha="right", fontsize=8)
    axis.axhline(DEAD_BELOW, color="#c0392b", linewidth=1)
    dead = int((relative[:, :real] < DEAD_BELOW).sum())
    axis.set_title(
        f"Load of the slots, sorted: mean and range over layers "
        f"({dead} of {relative.shape[0] * real} experts dead: under the red line)",
        fontsize=11,
    )
    axis.set_xticks([(real - 1) / 2, *([real + (num_zero - 1) / 2] if num_zero else [])])
    axis.set_xticklabels(["routed experts, sorted in each layer", *(["zero"] if num_zero else [])])
    axis.set_ylabel("load / even load")
    axis.set_xlim(-0.8, slots - 0.2)


def _draw_zero(axis: Any, severity: np.ndarray, share: np.ndarray, num_zero: int, slots: int) -> None:
    axis.set_title("Zero slots against severity", fontsize=11)
    axis.set_xlabel("severity of the degradation")
    axis.set_ylabel("share of zero slots")
    if not num_zero or not len(severity):
        message = "this adapter has no zero slots" if not num_zero else "no image seen"
        axis.text(0.5, 0.5, message, ha="center", va="center", transform=axis.transAxes)
        return
    axis.scatter(severity, share, s=9, alpha=0.35, color="#3b528b", linewidths=0, label="one image")
    if len(severity) >= 16:
        order = np.argsort(severity, kind="stable")
        parts = np.array_split(order, min(8, len(severity) // 8))
        centres = [severity[part].mean() for part in parts]
        axis.plot(centres, [share[part].mean() for part in parts], "o-", color="#c0392b", markersize=4, label="mean")
    axis.axhline(num_zero / slots, color="black", linewidth=1, linestyle="--", label="even load")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
