"""Curves of training runs, from their TensorBoard files, as one picture.

    python benchmarks/curves.py --out docs/images/training.png NAME=FOLDER [NAME=FOLDER ...] [--tags TAG ...]

One panel per scalar that any of the runs logged, one line per run; what is logged every few steps is drawn as a running
mean over a twentieth of the run, validation as points. A run that was resumed has several files: later ones count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = (
    "train/psnr", "train/features", "train/vsd", "train/gan", "train/discriminator", "routing/active_ranks",
    "routing/zero_severity_spearman", "val/psnr", "val/ssim", "val/niqe",
)  # fmt: skip
Curve = dict[int, float]


def curves(folder: Path) -> dict[str, Curve]:
    """All scalars under a run's folder, by tag, each from step to value."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{folder}: expected a run's folder with TensorBoard files, and there is none")
    found: dict[str, Curve] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours (N,), fewer at the ends."""
    ones = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.asarray(np.convolve(values, np.ones(width), mode="same") / ones)


def draw(runs: dict[str, dict[str, Curve]], tags: list[str]) -> Figure:
    """The picture: panels in rows of five at most."""
    columns = min(len(tags), 5)
    rows = -(-len(tags) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, tag in zip(panels, tags, strict=False):
        for number, (name, run) in enumerate(runs.items()):
            if not (points := sorted(run.get(tag, {}).items())):
                continue
            steps, values = np.array(points).T
            if len(points) > 50:
                panel.plot(steps, smooth(values, len(points) // 20), label=name, color=f"C{number}", linewidth=1)
            else:
                panel.plot(steps, values, "o-", label=name, color=f"C{number}", linewidth=1, markersize=3)
        panel.set_title(tag, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[len(tags) :]:
        panel.set_axis_off()
    handles, names = [], []
    for panel in panels[: len(tags)]:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    FigureCanvasAgg(figure)
    return figure


def main() -> int:
    """Read the runs, draw them, say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tags", nargs="+", default=list(TAGS))
    options = parser.parse_args()
    if wrong := [run for run in options.runs if "=" not in run]:
        parser.error(f"expected NAME=FOLDER, got {', '.join(wrong)}")
    runs = {name: curves(Path(folder)) for name, _, folder in (run.partition("=") for run in options.runs)}
    tags = [tag for tag in options.tags if any(tag in run for run in runs.values())]
    if not tags:
        logged = sorted({tag for run in runs.values() for tag in run})
        parser.error(f"no run has any of {', '.join(options.tags)}; they have {', '.join(logged)}")
    draw(runs, tags).savefig(options.out, dpi=80)
    print(f"{options.out}: {', '.join(tags)} of {', '.join(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
