"""PSNR-Y, SSIM-Y and NIQE of 100 pairs of 512x512: own functions against pyiqa, and the whole `score` on two processes.

    python benchmarks/metrics.py [--pairs 100] [--compared 20] [--json FILE]

Images are scikit-image's photographs, mirrored, with seeded noise. pyiqa's NIQE gets basicsr's pristine model, so that
nothing is downloaded. Own and pyiqa run in turns, on the same image, with one thread, and are measured in CPU seconds,
which a busy machine does not change much; for `score` both the wall time and the CPU time of all processes are given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from morsr.evaluation.images import read_rgb, to_tensor
from morsr.evaluation.scoring import score_folders
from morsr.functional.quality import bootstrap_mean
from morsr.models.metrics import build_metric

NAMES = ("psnr", "ssim", "niqe")


def write_pairs(folder: Path, count: int) -> None:
    """Write `count` pairs of 512x512 PNG files to folder/hr and folder/sr."""
    import skimage.data

    photographs = []
    for image in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea()):
        resized = Image.fromarray(image).resize((512, 512), Image.Resampling.LANCZOS)
        photographs.append(np.asarray(resized))
    for name in ("hr", "sr"):
        (folder / name).mkdir()
    for index in range(count):
        hr = photographs[index % 4][:: (-1) ** (index // 4), :: (-1) ** (index // 8)]
        noise = np.random.default_rng(index).normal(0, 3 + index % 12, hr.shape)
        Image.fromarray(np.ascontiguousarray(hr)).save(folder / "hr" / f"{index:03}.png", compress_level=1)
        sr = np.clip(hr + noise, 0, 255).astype(np.uint8)
        Image.fromarray(sr).save(folder / "sr" / f"{index:03}.png", compress_level=1)


def pyiqa_metrics(folder: Path) -> dict[str, Callable[..., torch.Tensor]]:
    """The three metrics by pyiqa, in the definitions of the published tables."""
    import pyiqa
    import scipy.io

    package = Path(importlib.util.find_spec("basicsr").origin).parent
    with np.load(package / "metrics" / "niqe_pris_params.npz") as model:
        scipy.io.savemat(
            folder / "niqe.mat", {"mu_prisparam": model["mu_pris_param"], "cov_prisparam": model["cov_pris_param"]}
        )
    device = torch.device("cpu")
    luma = {"device": device, "test_y_channel": True, "color_space": "ycbcr"}
    return {
        "psnr": pyiqa.create_metric("psnr", **luma),
        "ssim": pyiqa.create_metric("ssim", **luma),
        "niqe": pyiqa.create_metric("niqe", pretrained_model_path=str(folder / "niqe.mat"), **luma),
    }


def timed(function: Callable[[], torch.Tensor]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def cpu_seconds() -> float:
    """CPU time of this process and of the finished ones that it started."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compare(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Median seconds per pair of both, and the ratio pyiqa / own with its interval over pairs."""
    own = {name: build_metric(name) for name in NAMES}
    theirs = pyiqa_metrics(folder)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for path in sorted((folder / "hr").iterdir())[: count + 1]:
        hr, sr = to_tensor(read_rgb(path)), to_tensor(read_rgb(folder / "sr" / path.name))
        for name in NAMES:
            arguments = (sr,) if name == "niqe" else (sr, hr)
            one = timed(lambda name=name, arguments=arguments: own[name](*arguments))
            other = timed(lambda name=name, arguments=arguments: theirs[name](*arguments))
            seconds[name].append((one, other))
    rows = {}
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first pair warms both up
    seconds["all three"] = [tuple(map(sum, zip(*turn, strict=True))) for turn in zip(*seconds.values(), strict=True)]
    for name, values in seconds.items():
        _, low, high = bootstrap_mean(np.log([other / one for one, other in values]))
        rows[name] = {
            "own_s": statistics.median(one for one, _ in values),
            "pyiqa_s": statistics.median(other for _, other in values),
            "ratio": statistics.median(other / one for one, other in values),
            "ratio_low": float(np.exp(low)),
            "ratio_high": float(np.exp(high)),
        }
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--compared", type=int, default=20, help="pairs that pyiqa scores too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, max(args.pairs, args.compared + 1))
        started, cpu_started = time.perf_counter(), cpu_seconds()
        report = score_folders(
            {"sr": folder / "sr"}, folder / "hr", metrics=NAMES, out=folder / "out", processes=args.processes
        )
        whole, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
        rows = compare(folder, args.compared)
    print(f"score: {len(report.images)} pairs of 512x512, {args.processes} processes, start to table: {whole:.1f} s")
    print(f"CPU time of all processes: {cpu:.1f} s, {cpu / args.processes:.1f} s per process")
    print(
        "| metric | own s/pair | pyiqa s/pair | pyiqa / own (95 % interval of the mean) |\n| --- | ---: | ---: | ---: |"
    )
    for metric, row in rows.items():
        interval = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        print(f"| {metric} | {row['own_s']:.4f} | {row['pyiqa_s']:.4f} | {row['ratio']:.2f} ({interval}) |")
    result = {
        "pairs": len(report.images),
        "processes": args.processes,
        "seconds": whole,
        "cpu_seconds": cpu,
        "metrics": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
