"""Figures of the shipped model in the restorer: tiles against one pass, seams, colours, time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from morsr.functional.color import wavelet_low
from morsr.imaging.files import read_planes
from morsr.restoring import Restorer
from morsr.restoring.tiles import tiling

pytestmark = pytest.mark.slow

TILE = 256


@pytest.fixture(scope="module")
def shipped() -> Restorer:
    return Restorer.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[Tensor]:
    paths = sorted((shared_data / "realsr" / "LR").glob("*.png"))[::12]
    return [read_planes(path) for path in paths]


def low_frequency_error(restored: Tensor, lr: Tensor) -> float:
    """Mean CIE Delta E 2000 of the low-pass image against the bicubic input."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    reference = F.interpolate(lr, size=restored.shape[-2:], mode="bicubic").clamp(0, 1)
    lab = [rgb2lab(wavelet_low(image)[0].permute(1, 2, 0).clamp(0, 1).numpy()) for image in (restored, reference)]
    return float(deltaE_ciede2000(*lab).mean())


def test_tiles_are_close_to_one_pass_and_show_no_seam(shipped: Restorer, photographs: list[Tensor]):
    quality, across, elsewhere = [], [], []
    for lr in photographs:
        whole, tiled = shipped(lr, tile=None), shipped(lr, tile=TILE)
        quality.append(-10 * float((whole - tiled).square().mean().log10()))
        plan = tiling(whole.shape[-2:], TILE, shipped.generator.multiple)
        width = whole.shape[-1]
        edges = sorted(({w.left for w in plan.windows} | {w.left + w.width for w in plan.windows}) - {0, width})
        # One pass has gradients of its own at these columns; the quotient is what tiling adds.
        ratio = tiled.diff(dim=-1).abs().mean(dim=(0, 1, 2)) / whole.diff(dim=-1).abs().mean(dim=(0, 1, 2))
        inside = torch.ones(width - 1, dtype=torch.bool)
        for edge in edges:
            across.append(float(ratio[edge - 1]))
            inside[edge - 4 : edge + 3] = False
        elsewhere.append(float(ratio[inside].mean()))
    print(f"tiles of {TILE}: {np.mean(quality):.1f} dB, at least {min(quality):.1f}; seam {np.mean(across):.4f}")
    assert np.mean(quality) > 35
    assert abs(np.mean(across) / np.mean(elsewhere) - 1) < 0.02


def test_colours_stay(shipped: Restorer, photographs: list[Tensor]):
    errors = {
        color: float(np.mean([low_frequency_error(shipped(lr, color=color), lr) for lr in photographs]))
        for color in ("none", "adain", "wavelet")
    }
    print({color: round(error, 3) for color, error in errors.items()})
    assert errors["wavelet"] <= 1.0
    assert errors["wavelet"] <= errors["none"] + 1e-3
