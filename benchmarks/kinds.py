"""What routing does: every image restored under its own routing, the other kinds', and by the shared ranks alone.

    python benchmarks/kinds.py MODEL [MODEL ...] PHOTOS [--base BASE]

Of several models, such as those of the ablation's seeds, the mean is reported, and the correlations of the first.
PHOTOS is a folder of sharp photographs, such as BSDS500's validation images: the first twelve of every eighth from the
second, by name, top left 256x256, in five kinds of LR images at a quarter of the size. Reported in dB of PSNR-Y, with
95 % intervals over photographs: own - bicubic, own - shared only, own - others (mean of the other four routings; a
router can raise it by making wrong routings worse), and regret (best other routing - own). Then, for each degradation
alone, Spearman's correlation of its strength with the severity and with the share of zero slots: the mean over ten
photographs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from morsr import Restorer, RoutingTable
from morsr.evaluation.images import bicubic, read_rgb, to_tensor, to_uint8
from morsr.evaluation.statistics import bootstrap, mean_of
from morsr.evaluation.tables import number, text_table
from morsr.functional.quality import psnr_y, quantize_8bit
from morsr.functional.utilization import spearman

KINDS = {  # blur in LR pixels, noise of 255, quality of JPEG
    "clean": (0.0, 0.0, None),
    "blur": (1.5, 0.0, None),
    "noise": (0.0, 25.0, None),
    "JPEG": (0.0, 0.0, 20),
    "all": (1.0, 12.0, 40),
}
STRENGTHS = {
    "blur": [(sigma, 0.0, None) for sigma in np.linspace(0.3, 3.0, 10)],
    "noise": [(0.0, sigma, None) for sigma in np.linspace(2, 50, 10)],
    "JPEG": [(0.0, 0.0, round(quality)) for quality in np.linspace(95, 10, 10)],
}


def degraded(hr: np.ndarray, blur: float, noise: float, quality: int | None, seed: int) -> Tensor:
    """A quarter of the size by area, then blur, noise and JPEG, as (1, 3, h, w) in [0, 1]."""
    lr = cv2.resize(hr, (hr.shape[1] // 4, hr.shape[0] // 4), interpolation=cv2.INTER_AREA).astype(np.float64)
    lr = cv2.GaussianBlur(lr, (0, 0), blur) if blur else lr
    lr = lr + np.random.default_rng(seed).normal(0, noise, lr.shape) if noise else lr
    pixels = lr.round().clip(0, 255).astype(np.uint8)
    if quality is not None:
        encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]
    return to_tensor(pixels)


def photographs(folder: Path, side: int = 256, count: int = 12) -> list[np.ndarray]:
    """The photographs that are measured, (side, side, 3) uint8 each."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    found = [read_rgb(path)[:side, :side] for path in (paths[1::8] if len(paths) > 8 * count else paths)[:count]]
    return [image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4] for image in found]


@torch.no_grad()
def measure(restorer: Restorer, photos: list[np.ndarray]) -> np.ndarray:
    """PSNR-Y of every kind by the routing of each kind, by the shared ranks and by bicubic: (5, 7, photos)."""
    generator = restorer.generator
    found = np.empty((len(KINDS), len(KINDS) + 2, len(photos)))
    for index, hr in enumerate(tqdm(photos, unit="photo", disable=None)):
        images = [degraded(hr, *how, seed=index) for how in KINDS.values()]
        for row, lr in enumerate(images):
            outputs = [generator(lr, score_lr=scored).sr for scored in images]
            generator.adapters.strength = 0.0
            outputs.append(generator(lr).sr)
            generator.adapters.strength = 1.0
            outputs.append(to_tensor(bicubic(to_uint8(lr), *hr.shape[:2])))
            found[row, :, index] = [psnr_y(quantize_8bit(sr), to_tensor(hr)).item() for sr in outputs]
    return found


def correlations(restorer: Restorer, photos: list[np.ndarray]) -> list[list[str]]:
    """By degradation: Spearman's correlation of its strength with severity and zero share, mean over photographs."""
    found = []
    for name, strengths in STRENGTHS.items():
        steps, severity, zero = torch.arange(len(strengths)).float(), [], []
        for index, hr in enumerate(photos):
            images = torch.cat([degraded(hr, *how, seed=index) for how in strengths])
            table = RoutingTable.from_images(restorer, images)
            severity.append(spearman(steps, table.severity))
            zero.append(spearman(steps, table.zero_share().mean(1)))
        found.append([name, f"{mean_of(severity):+.2f}", f"{mean_of(zero):+.2f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="shipped preset, adapters file or saved folder")
    parser.add_argument("photos", type=Path, help="folder of sharp photographs")
    parser.add_argument("--base", help="folder or hub id of the base model, if the adapters do not bring it")
    options = parser.parse_args()
    load = partial(Restorer.from_pretrained, base=options.base, device="cpu", dtype="float32")
    restorers, photos = [load(model) for model in options.models], photographs(options.photos)
    found = np.mean([measure(restorer, photos) for restorer in restorers], axis=0)
    kinds = range(len(KINDS))
    own = found[kinds, kinds]
    others = (found[:, : len(KINDS)].sum(axis=1) - own) / (len(KINDS) - 1)
    gains = {"own - bicubic": own - found[:, -1], "own - shared only": own - found[:, -2], "own - others": own - others}
    regrets = [max((found[kind, other] - own[kind]).mean() for other in kinds if other != kind) for kind in kinds]
    lines = [
        [name, *(number(gain[kind].mean(), 3) for gain in gains.values()), number(regrets[kind], 3)]
        for kind, name in enumerate(KINDS)
    ]
    lines.append(["mean", *(str(bootstrap(gain.mean(0))) for gain in gains.values()), f"{max(regrets):.3f} at worst"])
    print(f"{len(photos)} photographs, dB of PSNR-Y\n\n{text_table(['kind', *gains, 'regret'], lines)}\n")
    print(text_table(["strength of", "ρ with severity", "ρ with zero share"], correlations(restorers[0], photos[:10])))


if __name__ == "__main__":
    main()
