"""Figures of the restorer: time, folders, tiles and seams, colours, padding, the autoencoder's tiles, memory.

    python benchmarks/restorer.py [PART …] [--model tiny] [--data ../shared/data/realsr] [--count 100]

Without names all parts run but `memory`, which restores images of 4096 and 8192 pixels a side (long on two cores;
--rows 3 stops each after three rows of tiles, by when the peak has been reached). Times are of interleaved pairs, so
that another program on the machine slows both sides. The photographs are RealSR's LR images, for `padding` those of
BSDS500.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor
from torch.nn import functional as F

from morsr.functional.color import match_color, wavelet_low
from morsr.functional.resample import bicubic_window
from morsr.models.backbone import load_backbone
from morsr.models.folder import restore_files
from morsr.models.jobs import Job, find_images
from morsr.models.passes import tile_plan
from morsr.models.picture import read_picture
from morsr.models.restorer import Restorer
from morsr.models.settings import Settings
from morsr.models.vae_tiles import vae_tiles

TILE = 256


def psnr(ours: Tensor, wanted: Tensor) -> float:
    return -10 * float((ours - wanted).square().mean().clamp(min=1e-12).log10())


def measure_time(restorer: Restorer, files: list[Path]) -> dict[str, Any]:
    """Seconds for 128 to 512 pixels a side, wall and processor, the median of nine."""
    lr = torch.rand(1, 3, 128, 128)
    restorer(lr)
    wall, processor = [], []
    for _ in range(9):
        start, used = time.perf_counter(), time.process_time()
        restorer(lr)
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "threads": torch.get_num_threads(),
        "wall_s": statistics.median(wall),
        "best_wall_s": min(wall),
        "processor_s": statistics.median(processor),
    }


def measure_folder(restorer: Restorer, files: list[Path], chunk: int = 25) -> dict[str, Any]:
    """Throughput of `restore_files` over restoring file by file, in alternating chunks of equal content."""
    ratios, together_s, alone_s = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        restorer.restore_file(files[0], Path(folder) / "warm.png")
        for number, start in enumerate(range(0, len(files), chunk)):
            jobs = [Job(path, Path(folder) / path.name) for path in files[start : start + chunk]]

            def together(jobs: list[Job] = jobs) -> None:
                failed = [outcome for outcome in restore_files(restorer, jobs, Settings()) if outcome.error]
                assert not failed, failed

            def alone(jobs: list[Job] = jobs) -> None:
                for job in jobs:
                    restorer.restore_file(*job)

            seconds = {}
            for run in (together, alone) if number % 2 else (alone, together):
                begun = time.perf_counter()
                run()
                seconds[run.__name__] = time.perf_counter() - begun
            ratios.append(seconds["alone"] / seconds["together"])
            together_s += seconds["together"]
            alone_s += seconds["alone"]
    return {
        "images": len(files),
        "together_per_s": len(files) / together_s,
        "alone_per_s": len(files) / alone_s,
        "ratio": alone_s / together_s,
        "ratio_of_chunks": [min(ratios), statistics.median(ratios), max(ratios)],
    }


def measure_tiles(restorer: Restorer, files: list[Path]) -> dict[str, Any]:
    """Tiles of 256 output pixels, and the autoencoder's own tiles, against one pass; gradients across the borders."""
    quality, own, across, elsewhere = [], [], [], []
    vae, factor = restorer.generator.backbone.vae, restorer.generator.backbone.latent_factor
    for path in files:
        lr = read_picture(path).rgb
        whole = restorer(lr, tile=None, color="none")
        with vae_tiles(vae, factor, TILE // factor // 2):
            own.append(psnr(restorer(lr, tile=None, color="none"), whole))
        tiled = restorer(lr, tile=TILE, color="none")
        quality.append(psnr(tiled, whole))
        plan = tile_plan(restorer.generator, (whole.shape[-2], whole.shape[-1]), TILE, torch.device("cpu"))
        assert max(plan.windows[0].height, plan.windows[0].width) == TILE
        for dim, starts in (
            (-1, {(w.left, w.width) for w in plan.windows}),
            (-2, {(w.top, w.height) for w in plan.windows}),
        ):
            length = whole.shape[dim]
            edges = sorted({start for start, _ in starts} | {start + size for start, size in starts} - {0, length})
            other = -1 if dim == -2 else -2
            steps = [image.diff(dim=dim).abs().mean(dim=(0, 1, other)) for image in (tiled, whole)]
            inside = torch.ones(length - 1, dtype=torch.bool)
            for edge in edges:
                if 0 < edge < length:
                    inside[max(0, edge - 4) : edge + 3] = False
                    # One pass has gradients of its own at these lines; the quotient is what tiling adds.
                    across.append(float(steps[0][edge - 1] / steps[1][edge - 1]))
            elsewhere.append(float((steps[0][inside] / steps[1][inside]).mean()))
    return {
        "images": len(files),
        "end_to_end_db": [min(quality), statistics.mean(quality)],
        "autoencoder_tiles_db": [min(own), statistics.mean(own)],
        "gradient_across_over_elsewhere": statistics.mean(across) / statistics.mean(elsewhere),
    }


def measure_color(restorer: Restorer, files: list[Path]) -> dict[str, Any]:
    """Mean CIE ΔE2000 between the low-pass result and the low-pass bicubic input, for every setting."""
    settings = [("none", 1.0), ("adain", 0.5), ("adain", 1.0), ("wavelet", 0.5), ("wavelet", 1.0)]
    errors: dict[str, list[float]] = {f"{method} {strength:g}": [] for method, strength in settings}
    for path in files:
        lr = read_picture(path).rgb
        plain = restorer(lr, color="none")
        size = (plain.shape[-2], plain.shape[-1])
        reference = bicubic_window(lr, size, height=size[0], width=size[1]).clamp(0, 1)
        wanted = lab(reference)
        for method, strength in settings:
            colored = match_color(plain, reference, method=method, strength=strength).clamp(0, 1)
            errors[f"{method} {strength:g}"].append(float(deltaE_ciede2000(lab(colored), wanted).mean()))
    return {"images": len(files), **{name: statistics.mean(values) for name, values in errors.items()}}


def lab(images: Tensor) -> Any:
    return rgb2lab(wavelet_low(images)[0].permute(1, 2, 0).clamp(0, 1).numpy())


def measure_padding(restorer: Restorer, files: list[Path]) -> dict[str, Any]:
    """Distance in dB of the last 32 pixels to a pass that sees the picture go on, for two rules of padding."""
    generator = restorer.generator
    quality: dict[str, list[float]] = {"replicate": [], "reflect": []}

    def run(images: Tensor) -> Tensor:
        return generator.decode(generator.denoise(generator.encode(images)))

    with torch.no_grad():
        for path in files:
            hr = read_picture(path).rgb
            hr = hr[..., : hr.shape[-2] // 64 * 64, : hr.shape[-1] // 64 * 64]
            lr = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
            generator.condition(lr)
            seen = bicubic_window(lr, hr.shape[-2:], height=hr.shape[-2], width=hr.shape[-1]).clamp(0, 1)
            whole = run(seen)
            for missing in range(4, generator.multiple, 4):
                height, width = (side - 64 - missing for side in hr.shape[-2:])
                for rule, values in quality.items():
                    padded = F.pad(seen[..., :height, :width], (0, missing, 0, missing), mode=rule)
                    error = (run(padded) - whole[..., : padded.shape[-2], : padded.shape[-1]])[..., :height, :width]
                    border = torch.cat([error[..., -32:, :].flatten(), error[..., -32:].flatten()])
                    values.append(-10 * float(border.square().mean().log10()))
    return {"images": len(files), **{rule: statistics.mean(values) for rule, values in quality.items()}}


def measure_autoencoder(restorer: Restorer, files: list[Path]) -> dict[str, Any]:
    """Tiles of an autoencoder with group norms (Stable Diffusion's, random weights) against the whole, 512 pixels."""
    torch.manual_seed(0)
    vae, factor = load_backbone("random:sd21").vae.eval(), 8
    results = {}
    with torch.no_grad():
        image = 2 * restorer(read_picture(files[0]).rgb) - 1
        latents = vae.encode(image).latent_dist.mean
        decoded = vae.decode(latents).sample
        with vae_tiles(vae, factor, TILE // factor):
            for name, ours, wanted in (
                ("encoder_db", vae.encode(image).latent_dist.mean, latents),
                ("decoder_db", vae.decode(latents).sample, decoded),
            ):
                results[name] = psnr(ours / float(wanted.std()), wanted / float(wanted.std()))
    return {"tile": TILE, **results}


def measure_memory(sides: list[int], rows: float) -> dict[str, Any]:
    """Peak of the process above the loaded model, in MiB, for square outputs that are streamed."""
    peaks: dict[str, Any] = {}
    for side in sides:
        command = [sys.executable, __file__, "--one-memory", str(side), "--rows", str(rows)]
        peaks[str(side)] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    values = [peaks[str(side)] for side in sides]
    peaks["last_over_first"] = values[-1] / values[0]
    return peaks


def one_memory(side: int, rows: float) -> float:
    """Restore one synthetic image of side / 4 and return the peak in MiB (Linux: VmHWM, reset after loading)."""

    def field(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    class Enough(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done >= rows * total**0.5:
            raise Enough

    folder = Path(tempfile.mkdtemp())
    try:
        rng = np.random.default_rng(0)
        small = Image.fromarray(rng.integers(0, 256, (side // 32, side // 32, 3), np.uint8))
        blurred = np.asarray(small.resize((side // 4, side // 4), Image.Resampling.BICUBIC), np.int16)
        noisy = (blurred + rng.integers(-8, 8, blurred.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "in.png")
        del small, blurred, noisy
        restorer = Restorer.from_pretrained("tiny", device="cpu")
        restorer(torch.rand(1, 3, 32, 32))
        Path("/proc/self/clear_refs").write_text("5")
        loaded = field("VmRSS")
        with contextlib.suppress(Enough):
            restorer.restore_file(folder / "in.png", folder / "out.png", progress=progress)
        return field("VmHWM") - loaded
    finally:
        shutil.rmtree(folder)


def spread(folder: Path, count: int) -> list[Path]:
    """At most so many images of a folder, evenly spread over all."""
    files = find_images(folder)
    return [files[index * len(files) // count] for index in range(min(count, len(files)))]


PARTS = {
    "time": measure_time,
    "folder": measure_folder,
    "tiles": measure_tiles,
    "color": measure_color,
    "padding": measure_padding,
    "autoencoder": measure_autoencoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, "memory"]))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/realsr"))
    parser.add_argument("--photographs", type=Path, default=Path("../shared/data/bsds500/val"), help="for padding")
    parser.add_argument("--count", type=int, default=100, help="photographs, evenly spread over all")
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rows", type=float, default=float("inf"), help="rows of tiles after which memory stops")
    parser.add_argument("--one-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="tiny", help="of all parts but memory (default: tiny)")
    options = parser.parse_args()
    if unknown := sorted({*options.parts} - {*PARTS, "memory"}):
        parser.error(f"unknown part {', '.join(unknown)}; expected {', '.join([*PARTS, 'memory'])}")
    if options.one_memory:
        print(one_memory(options.one_memory, options.rows))
        return
    files = spread(options.data / "LR", options.count)
    restorer = Restorer.from_pretrained(options.model, device="cpu")
    results: dict[str, Any] = {}
    for part in options.parts or PARTS:
        if part == "memory":
            results[part] = measure_memory(options.sides, options.rows)
        else:
            chosen = spread(options.photographs, min(options.count, 10)) if part == "padding" else files
            results[part] = PARTS[part](restorer, chosen)
        print(part, json.dumps(results[part]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
