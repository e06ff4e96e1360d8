"""The strip of the README: one photograph in four conditions, with the ranks that run.

    python benchmarks/strip.py

It shows scikit-image's chelsea at a quarter of its size: clean, with noise of σ = 25 levels, blurred by
σ = 1.5 LR pixels, and as a JPEG of quality 20. Under each LR image: its gates (layers down, routed ranks across), the
result, and the gain in PSNR-Y over the same model with its shared ranks alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from kinds import KINDS, degraded
from matplotlib.figure import Figure
from skimage import data

from morsr import Restorer
from morsr.evaluation.images import to_tensor
from morsr.functional.quality import psnr_y, quantize_8bit

OUT = Path(__file__).resolve().parents[1] / "docs/images/routing_strip.png"
SHOWN = {"clean": "clean", "noise": "noisy, σ = 25", "blur": "blurred, σ = 1.5", "JPEG": "JPEG, quality 20"}


@torch.inference_mode()
def main() -> None:
    restorer = Restorer.from_pretrained("tiny", device="cpu")
    adapters = restorer.generator.adapters
    photograph = np.ascontiguousarray(data.chelsea()[:, 60:360])
    target = quantize_8bit(to_tensor(photograph))
    experts, top_k = adapters.config.num_experts, adapters.config.top_k
    figure = Figure(figsize=(10.5, 9), layout="constrained")
    axes = figure.subplots(3, len(SHOWN), height_ratios=[1, 0.5, 1])
    for column, (kind, title) in enumerate(SHOWN.items()):
        lr = degraded(photograph, *KINDS[kind], seed=0)
        sr, routing = restorer(lr, return_routing=True)
        shared = restorer(lr, strength=0)
        gates = routing.gates[:, 0, :experts]
        mass, count = gates.sum(-1).mean().item(), (gates > 0).sum(-1).float().mean().item()
        gain = (psnr_y(quantize_8bit(sr), target) - psnr_y(quantize_8bit(shared), target)).item()
        top, middle, bottom = axes[:, column]
        top.imshow(lr[0].permute(1, 2, 0))
        top.set_title(title, fontsize=13, weight="bold")
        shown = middle.imshow(gates, aspect="auto", vmin=0, vmax=2, cmap="Oranges", interpolation="nearest")
        middle.set_title(f"{count:.1f} of {experts} ranks chosen\ngate mass {mass:.2f} of {top_k}", fontsize=10)
        bottom.imshow(sr[0].permute(1, 2, 0))
        bottom.set_title(f"{gain:+.2f} dB over\nshared ranks alone", fontsize=10)
        for axis in (top, middle, bottom):
            axis.set(xticks=[], yticks=[])
        print(f"{kind:6} ranks {count:.2f}  gate mass {mass:.3f}  gain {gain:+.2f} dB")
    for axis, label in zip(axes[:, 0], ("LR image", "layers", "result, ×4"), strict=True):
        axis.set_ylabel(label, fontsize=12)
    axes[1, 0].set_xlabel("routed ranks", fontsize=10)
    figure.colorbar(shown, ax=axes[1, :], label="gate", pad=0.01)
    figure.savefig(OUT, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
