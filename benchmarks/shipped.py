"""The shipped model on the embedded held-out photographs, RealSR, degraded BSDS500 photographs, and sharp ones.

    python benchmarks/shipped.py [--sets embedded realsr bench40 held] [--data ../shared/data]
        [--gallery docs/images/gallery]

Each set is scored in one run (PSNR-Y, SSIM-Y, NIQE, features; outputs as 8-bit files) for bicubic, the model, its
shared ranks alone, and the outputs of a compact Real-ESRGAN where the folder has them, with paired 95 % intervals. The
gallery holds eight of the embedded pairs: two with the lowest gain in PSNR over bicubic, six at even steps of the rest.
`held` are ten sharp photographs that were not trained on, shrunk by 4; then come the gain of each over bicubic, and the
PSNR-Y of ×1 on its middle, to the photograph itself. A scoring on RealSR belongs into the model card, with its commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from PIL import Image

from morsr import Restorer
from morsr.data import Pair, Photo, RealESRGANDataModule, paired_folder
from morsr.evaluation.images import read_rgb, to_tensor, to_uint8
from morsr.evaluation.score import Method, bicubic_method, evaluate
from morsr.evaluation.tables import BenchmarkReport
from morsr.functional.quality import psnr_y, quantize_8bit
from morsr.imaging.figures import side_by_side

METRICS = ("psnr", "ssim", "niqe", "features")


def compact_method(pairs: Sequence[Photo], folder: Path) -> Method:
    """The outputs that another network made of the same LR images, known by their pixels."""
    outputs = {to_tensor(pair.load().lr).numpy().tobytes(): folder / f"{pair.stem}.webp" for pair in pairs}
    return lambda lr: to_tensor(read_rgb(outputs[lr.numpy().tobytes()]))


def gallery(report: BenchmarkReport, pairs: Sequence[Pair], methods: dict[str, Method], target: Path) -> None:
    """Write one picture per chosen image, and print the lines of the page that shows them."""
    target.mkdir(parents=True, exist_ok=True)
    plain, ours = report.values("bicubic", "psnr"), report.values("tiny", "psnr")
    gains = {stem: value - plain[stem] for stem, value in ours.items()}
    ordered = sorted(pairs, key=lambda pair: gains[pair.stem])
    rest = ordered[2:]
    chosen = ordered[:2] + [rest[round(place * (len(rest) - 1) / 5)] for place in range(6)]
    for number, pair in enumerate(chosen, start=1):
        stem = pair.stem
        line = {name: to_uint8(restore(to_tensor(pair.lr))) for name, restore in methods.items()}
        sheet = side_by_side([line | {"original": pair.hr}], crop=224, zoom=1)
        Image.fromarray(sheet).save(target / f"{number}_{stem}.png")
        print(f"**{stem}**, {gains[stem]:+.2f} dB.\n\n![{stem}](../images/gallery/{number}_{stem}.png)\n")


def embedded() -> list[Pair]:
    """The four held-out photographs of the package under five seeds, as validation degrades them."""
    data = RealESRGANDataModule(val_multiple=16, num_workers=0)
    data.setup("test")
    batches = map(data.finish_batch, data.test_dataloader())
    return [Pair(made["stem"][0], to_uint8(made["hr"]), to_uint8(made["lr"]), made["image"][0]) for made in batches]


def held_out(folder: Path) -> list[Pair]:
    """Sharp photographs, shrunk by 4 by area."""
    pairs = []
    for name in Path("experiments/lists/photos_held10.txt").read_text().split():
        hr = read_rgb(folder / name)
        height, width = (side // 4 for side in hr.shape[:2])
        hr = hr[: 4 * height, : 4 * width]
        pairs.append(Pair(name, hr, cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA)))
    return pairs


def unharmed(restorer: Restorer, pairs: Sequence[Pair], report: BenchmarkReport) -> None:
    """Print what ×4 gains on sharp photographs, and how near ×1 leaves their middle 256² to themselves."""
    ours, plain = report.values("tiny", "psnr"), report.values("bicubic", "psnr")
    for pair in pairs:
        top, left = ((side - 256) // 2 for side in pair.hr.shape[:2])
        image = to_tensor(pair.hr[top : top + 256, left : left + 256])
        same = psnr_y(quantize_8bit(restorer(image, scale=1)), image).item()
        print(f"{pair.stem}: ×4 {ours[pair.stem] - plain[pair.stem]:+.2f} dB over bicubic, ×1 {same:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["embedded"], choices=("embedded", "realsr", "bench40", "held"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with realsr and bench40")
    parser.add_argument("--gallery", type=Path, help="folder for the pictures of the embedded set")
    options = parser.parse_args()
    restorer = Restorer.from_pretrained("tiny", device="cpu", dtype="float32")
    common: dict[str, Method] = {"bicubic": bicubic_method(), "tiny": partial(restorer, tile=None)}
    made = {"embedded": embedded, "held": partial(held_out, options.data / "photos")}
    for name in options.sets:
        folder = options.data / name
        pairs: Any = made[name]() if name in made else paired_folder(folder / "LR", folder / "HR")
        methods = common | {"shared only": partial(restorer, tile=None, strength=0.0)}
        if (compact := folder / "compact").is_dir():
            methods["compact"] = compact_method(pairs, compact)
        report = evaluate(methods, pairs, METRICS)
        print(f"\n{name}: {len(pairs)} images\n\n{report.to_text()}\n")
        for other in [key for key in methods if key not in common]:
            differences = [f"{metric} {report.difference('tiny', metric, other)}" for metric in METRICS]
            print(f"tiny - {other}: {', '.join(differences)}")
        if name == "held":
            unharmed(restorer, pairs, report)
        if name == "embedded" and options.gallery:
            gallery(report, pairs, common, options.gallery)


if __name__ == "__main__":
    main()
