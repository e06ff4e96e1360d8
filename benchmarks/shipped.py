"""The shipped presets on the embedded held-out photographs and on RealSR, and eight pictures to look at.

    python benchmarks/shipped.py [--sets embedded realsr] [--gallery docs/images/gallery]
        [--sheet docs/images/side_by_side.png] [--out runs/shipped]

Each set is scored in one run (PSNR-Y, SSIM-Y, NIQE; outputs as 8-bit files) for bicubic, `tiny` and `tiny-fidelity`,
with paired 95 % intervals. The gallery holds eight of the embedded pairs: the two with the lowest gain in PSNR
of `tiny` over bicubic, and six at even steps of the rest. An evaluation on RealSR belongs into the model card, with its
commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from morsr import Restorer
from morsr.data import Pair, Photo, embedded_benchmark, paired_folder
from morsr.evaluation.images import side_by_side, to_tensor, to_uint8
from morsr.evaluation.score import Method, bicubic_method, evaluate
from morsr.evaluation.tables import BenchmarkReport

PRESETS = ("tiny", "tiny-fidelity")


def method(restorer: Restorer, color: str) -> Method:
    """Restore with the default settings in one pass, scores and routing of the image itself."""

    def restore(lr: Tensor) -> Tensor:
        return restorer(lr, tile=None, color=color)

    return restore


def gains(report: BenchmarkReport, metric: str) -> dict[str, float]:
    """By how much `tiny` is above bicubic in every image."""
    ours, plain = report.values("tiny", metric), report.values("bicubic", metric)
    return {stem: value - plain[stem] for stem, value in ours.items()}


def chosen(report: BenchmarkReport, count: int = 8) -> list[str]:
    """The two images with the lowest gain in PSNR, then others at even steps to the highest."""
    ordered = sorted(gains(report, "psnr").items(), key=lambda item: item[1])
    stems = [stem for stem, _ in ordered]
    rest = stems[2:]
    return stems[:2] + [rest[round(place * (len(rest) - 1) / (count - 3))] for place in range(count - 2)]


def gallery(report: BenchmarkReport, pairs: Sequence[Pair], methods: dict[str, Method], target: Path) -> None:
    """Write one picture per chosen image, and print the lines of the page that shows them."""
    target.mkdir(parents=True, exist_ok=True)
    psnr, niqe, by_stem = gains(report, "psnr"), gains(report, "niqe"), {pair.stem: pair for pair in pairs}
    for number, stem in enumerate(chosen(report), start=1):
        pair = by_stem[stem]
        lr = to_tensor(pair.lr)
        line = {name: to_uint8(restore(lr)) for name, restore in methods.items()} | {"original": pair.hr}
        sheet = side_by_side([line], crop=224, zoom=1, corner_of="original")
        Image.fromarray(sheet).save(target / f"{number}_{stem}.png")
        said = f"**{number}. {stem}**: PSNR {psnr[stem]:+.2f} dB, NIQE {niqe[stem]:+.2f} against bicubic"
        print(f"{said}\n\n![{stem}](images/gallery/{number}_{stem}.png)\n")


def sheet_of_medians(report: BenchmarkReport, pairs: Sequence[Pair], methods: dict[str, Method], target: Path) -> None:
    """Write one picture with a line per photograph: of its degradations the middle one by `tiny`'s gain in PSNR."""
    ordered = sorted(gains(report, "psnr").items(), key=lambda item: item[1])
    photographs = sorted({stem.rpartition("_s")[0] for stem, _ in ordered})
    by_stem, lines = {pair.stem: pair for pair in pairs}, []
    for photograph in photographs:
        stems = [stem for stem, _ in ordered if stem.rpartition("_s")[0] == photograph]
        pair = by_stem[stems[len(stems) // 2]]
        restored = {name: to_uint8(methods[name](to_tensor(pair.lr))) for name in ("bicubic", *reversed(PRESETS))}
        lines.append({**restored, "original": pair.hr})
    Image.fromarray(side_by_side(lines, crop=192, zoom=1, corner_of="original")).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["embedded"], choices=("embedded", "realsr"))
    parser.add_argument("--realsr", type=Path, default=Path("../shared/data/realsr"), help="folder with LR and HR")
    parser.add_argument("--color", default="wavelet", choices=("wavelet", "adain", "none"), help="colour correction")
    parser.add_argument("--gallery", type=Path, help="folder for the pictures of the embedded set")
    parser.add_argument("--sheet", type=Path, help="file for the picture of the README")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    options = parser.parse_args()
    methods: dict[str, Method] = {"bicubic": bicubic_method()}
    methods |= {name: method(Restorer.from_pretrained(name, device="cpu"), options.color) for name in PRESETS}
    sets: dict[str, Callable[[], Sequence[Pair | Photo]]] = {
        "embedded": embedded_benchmark,
        "realsr": lambda: paired_folder(options.realsr / "LR", options.realsr / "HR"),
    }
    for name in options.sets:
        pairs = list(sets[name]())
        report = evaluate(methods, pairs, out=options.out / name if options.out else None, reference="bicubic")
        print(f"\n{name}: {len(pairs)} images\n\n{report.to_text()}")
        if name == "embedded":
            degraded = [pair for pair in pairs if isinstance(pair, Pair)]
            if options.gallery:
                gallery(report, degraded, methods, options.gallery)
            if options.sheet:
                sheet_of_medians(report, degraded, methods, options.sheet)


if __name__ == "__main__":
    main()
