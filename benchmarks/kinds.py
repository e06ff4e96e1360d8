"""What routing does: every image restored under its own routing, the other kinds', and by the shared ranks alone.

    python benchmarks/kinds.py MODEL [MODEL ...] PHOTOS [--base BASE] [--gains-only]

Of several models, such as those of the ablation's seeds, the mean is reported, and the correlations of the first.
PHOTOS is a folder of sharp photographs, such as BSDS500's validation images: the first twelve of every eighth from the
second, by name, top left 256x256, in five kinds of LR images at a quarter of the size. Reported in dB of PSNR-Y, with
95 % intervals over photographs: own - bicubic, own - shared only, own - others (mean of the other four routings; a
router can raise it by making wrong routings worse), and regret (best other routing - own) of the worst pair of kinds.
Then, for each degradation alone, Spearman's correlation of its strength with the severity and with the share of zero
slots: the mean over ten photographs.
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
def measure(restorer: Restorer, photos: list[np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """PSNR-Y by kind and by the routing: of each kind, "shared only", and "bicubic"; one value per photograph."""
    generator = restorer.generator
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for index, hr in enumerate(tqdm(photos, unit="photo", disable=None)):
        truth = to_tensor(hr)
        images = {kind: degraded(hr, *how, seed=index).to(restorer.device) for kind, how in KINDS.items()}
        for kind, lr in images.items():
            outputs = {other: generator(lr, score_lr=scored).sr for other, scored in images.items()}
            generator.adapters.strength = 0.0
            outputs["shared only"] = generator(lr).sr
            generator.adapters.strength = 1.0
            outputs["bicubic"] = to_tensor(bicubic(to_uint8(lr), *hr.shape[:2]))
            for name, sr in outputs.items():
                found[kind].setdefault(name, []).append(psnr_y(quantize_8bit(sr.cpu()), truth).item())
    return found


def differences(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """By kind: what own routing gains, per photograph."""
    gains: dict[str, dict[str, list[float]]] = {}
    for kind, values in found.items():
        own = np.array(values[kind])
        others = {name: np.array(values[name]) for name in KINDS if name != kind}
        gains[kind] = {
            "own - bicubic": list(own - values["bicubic"]),
            "own - shared only": list(own - values["shared only"]),
            "own - others": list(own - np.mean(list(others.values()), axis=0)),
            "regret": [max(float(np.mean(other - own)) for other in others.values())],
        }
    return gains


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
    parser.add_argument("--count", type=int, default=12, help="photographs (default: %(default)s)")
    parser.add_argument("--gains-only", action="store_true", help="leave out the correlations, which take most time")
    options = parser.parse_args()
    load = partial(Restorer.from_pretrained, base=options.base, device="cpu", dtype="float32")
    restorers = [load(model) for model in options.models]
    photos = photographs(options.photos, count=options.count)
    measured = [measure(restorer, photos) for restorer in restorers]
    found = {
        kind: {name: list(np.mean([one[kind][name] for one in measured], axis=0)) for name in values}
        for kind, values in measured[0].items()
    }
    gains = differences(found)
    columns = list(gains["clean"])
    lines = [[kind, *(number(float(np.mean(gain[name])), 3) for name in columns)] for kind, gain in gains.items()]
    means = {name: bootstrap(np.mean([gain[name] for gain in gains.values()], axis=0)) for name in columns[:-1]}
    worst = max(gain["regret"][0] for gain in gains.values())
    lines.append(["mean", *(str(value) for value in means.values()), f"{worst:.3f} at worst"])
    print(f"{len(photos)} photographs, dB of PSNR-Y\n\n{text_table(['kind', *columns], lines)}\n")
    if not options.gains_only:
        print(
            text_table(["strength of", "ρ with severity", "ρ with zero share"], correlations(restorers[0], photos[:10]))
        )


if __name__ == "__main__":
    main()
