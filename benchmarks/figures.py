"""The two figures of the README: the method as SVG, and one photograph in four conditions with the ranks that run.

    python benchmarks/figures.py method
    python benchmarks/figures.py strip

The strip shows scikit-image's chelsea at a quarter of its size: clean, with noise of σ = 25 levels, blurred by
σ = 1.5 LR pixels, and as a JPEG of quality 20. Under each LR image: its gates (layers down, routed ranks across), the
result, and the gain in PSNR-Y over the same model with its shared ranks alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from kinds import KINDS, degraded
from matplotlib import pyplot
from skimage import data

from morsr import Restorer
from morsr.evaluation.images import to_tensor
from morsr.functional.quality import psnr_y, quantize_8bit

DOCS = Path(__file__).resolve().parents[1] / "docs"
INK, BLUE, ORANGE, GRAY, PALE, FROZEN = "#1f2933", "#2563ab", "#d97706", "#9aa5b1", "#e4ecf5", "#f1f3f5"
SHOWN = {"clean": "clean", "noise": "noisy, σ = 25", "blur": "blurred, σ = 1.5", "JPEG": "JPEG, quality 20"}


def text(x: float, y: float, line: str, *, size: int = 14, weight: str = "normal", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{line}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = GRAY) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}"/>'


def arrow(*points: tuple[float, float], color: str = INK) -> str:
    line = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" marker-end="url(#tip-{color[1:]})"/>'
    )


def method() -> str:
    """The way of an image: above the networks, below the scores that choose the ranks."""
    parts = [
        box(20, 60, 90, 90, PALE), text(65, 101, "LR", size=18, weight="bold"), text(65, 122, "h × w", size=12),
        box(150, 60, 100, 90, FROZEN), text(200, 101, "enlarge ×4,"), text(200, 121, "VAE encoder"),
        box(290, 30, 420, 150, FROZEN), text(500, 54, "one step of a frozen diffusion UNet", weight="bold"),
        box(750, 60, 100, 90, FROZEN), text(800, 101, "x₀,"), text(800, 121, "VAE decoder"),
        box(890, 60, 90, 90, PALE), text(935, 101, "SR", size=18, weight="bold"), text(935, 122, "4h × 4w", size=12),
        arrow((110, 105), (148, 105)), arrow((250, 105), (288, 105)),
        arrow((710, 105), (748, 105)), arrow((850, 105), (888, 105)),
        # one adapted layer
        text(340, 90, "each layer", size=12), text(340, 116, "W₀x", size=16, weight="bold"),
        text(395, 116, "+", size=18), text(470, 78, "shared", size=12, fill=BLUE),
        text(590, 78, "routed ranks × gate", size=12, fill=ORANGE),
        text(440, 168, "B (g ⊙ A x): a LoRA whose ranks are experts", size=13),
        # estimator and router
        box(20, 230, 230, 84, "#ffffff", BLUE), text(135, 258, "estimator", size=15, weight="bold"),
        text(135, 280, "blur, noise, JPEG, resolution", size=12), text(135, 298, "scores in [0, 1], severity", size=12),
        box(390, 230, 300, 84, "#ffffff", ORANGE), text(540, 258, "router, one per layer", size=15, weight="bold"),
        text(540, 280, "top k of the slots, softmax over real ones", size=12),
        text(540, 298, "zero slots stand for “nothing to do”", size=12),
        arrow((65, 150), (65, 228), color=BLUE), arrow((250, 272), (388, 272), color=BLUE),
        arrow((620, 230), (620, 152), color=ORANGE),
        text(319, 262, "scores", size=12, fill=BLUE), text(655, 206, "gates g", size=12, fill=ORANGE),
        text(850, 262, "Trained: ranks and router.", size=13),
        text(850, 282, "The severity weighs zero slots", size=13),
        text(850, 302, "in the balance loss.", size=13),
    ]  # fmt: skip
    parts += [box(430 + 26 * i, 88, 20, 56, BLUE, BLUE) for i in range(3)]
    gates = (1.0, 0.0, 0.55, 0.0, 0.0, 0.8, 0.25)
    parts += [box(522 + 24 * i, 88, 18, 56, "#ffffff") for i in range(len(gates))]
    parts += [box(522 + 24 * i, 144 - 56 * g, 18, 56 * g, ORANGE, ORANGE) for i, g in enumerate(gates) if g]
    tips = "".join(
        f'<marker id="tip-{color[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
        for color in (INK, BLUE, ORANGE)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 335" role="img" font-family="Helvetica, Arial, '
        'sans-serif" text-anchor="middle"><title>LR image, estimator, router, ranks on a frozen UNet, SR image</title>'
        f'<defs>{tips}</defs><rect width="1000" height="335" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


@torch.inference_mode()
def strip(out: Path) -> None:
    """Draw the strip, and print a line of figures per condition."""
    restorer = Restorer.from_pretrained("tiny", device="cpu")
    adapters = restorer.generator.adapters
    assert adapters is not None
    photograph = np.ascontiguousarray(data.chelsea()[:, 60:360])
    target = quantize_8bit(to_tensor(photograph))
    experts, top_k = adapters.config.num_experts, adapters.config.top_k
    figure, axes = pyplot.subplots(3, len(SHOWN), figsize=(10.5, 9), height_ratios=[1, 0.5, 1], layout="constrained")
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
    figure.savefig(out, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("method", "strip"))
    if parser.parse_args().figure == "method":
        (DOCS / "method.svg").write_text(method(), encoding="utf-8")
    else:
        strip(DOCS / "images/routing_strip.png")
