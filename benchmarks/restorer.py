"""The restorer: `tiny` over its bare base and over a compact network, a folder, and the peak memory of large outputs.

    python benchmarks/restorer.py base [--rounds 15]
    python benchmarks/restorer.py compact [--rounds 15]
    python benchmarks/restorer.py folder FOLDER
    python benchmarks/restorer.py memory

`base`: 128² to 512², estimator, router and ranks included, over the base without adapters. `compact`: the same over a
network of compact Real-ESRGAN's shape (34 convolutions of 64 channels, PReLU, pixel shuffle; random weights). `folder`:
a folder, as `morsr upscale` restores it, over its images one after another, by one loaded model. `memory`: resident
peak of an 8192² output over that of a 4096² one, each in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import compare, print_table
from torch import nn

from morsr import Restorer
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator
from morsr.restoring.folder import folder_jobs, restore_files
from morsr.restoring.settings import Settings


def base(rounds: int) -> list[dict[str, Any]]:
    """The shipped model over its base without adapters, with the same one-step settings."""
    restorer = Restorer.from_pretrained("tiny")
    plain = Restorer(OneStepGenerator(load_base("tiny"), None, one_step=restorer.generator.one_step).eval())
    lr = torch.rand(1, 3, 128, 128)
    found = compare(lambda: restorer(lr, tile=None), lambda: plain(lr, tile=None), rounds=rounds)
    return [{"what": "tiny, 128² to 512², over its bare base", **found._asdict()}]


def compact(rounds: int) -> list[dict[str, Any]]:
    """The shipped model, from image to image, over one pass of a network of compact Real-ESRGAN's shape."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.PReLU(64)]
    for _ in range(32):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.PReLU(64)]
    network = nn.Sequential(*layers, nn.Conv2d(64, 48, 3, padding=1), nn.PixelShuffle(4))
    restorer, lr = Restorer.from_pretrained("tiny"), torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        found = compare(lambda: restorer(lr, tile=None), lambda: network(lr), rounds=rounds)
    return [{"what": "tiny, 128² to 512², over a compact network", **found._asdict()}]


def folder(source: Path) -> list[dict[str, Any]]:
    """Images per second of a folder over those of its files one by one."""
    restorer = Restorer.from_pretrained("tiny")
    with tempfile.TemporaryDirectory() as out:
        jobs = folder_jobs(source, Path(out, "folder"))
        restorer.restore_file(jobs[0].source, Path(out, "first.png"))
        start = time.perf_counter()
        for _ in restore_files(restorer, jobs, Settings()):
            pass
        together = time.perf_counter() - start
        start = time.perf_counter()
        for job in jobs:
            restorer.restore_file(job.source, Path(out, "single", job.target.name))
        single = time.perf_counter() - start
    return [{"what": f"{len(jobs)} images, folder over one by one", "ours": len(jobs) / together,
             "peer": len(jobs) / single, "ratio": single / together}]  # fmt: skip


def memory() -> list[dict[str, Any]]:
    """Peak of the process by the side of the output."""
    code = (
        "import resource, sys; from PIL import Image; from morsr.cli import main; "
        "Image.effect_noise(({0}, {0}), 60).convert('RGB').save('{1}/a.png'); "
        "main(['upscale', '{1}/a.png', '{1}/b.png']); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    peaks = []
    for side in (1024, 2048):
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(
                [sys.executable, "-c", code.format(side, scratch)], capture_output=True, text=True, check=True
            )
            peaks.append(float(done.stdout.split()[-1]))
    return [
        {
            "what": "peak memory (MiB), 8192² over 4096² output",
            "ours": peaks[1],
            "peer": peaks[0],
            "ratio": peaks[1] / peaks[0],
        }
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("base", "compact", "folder", "memory"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.part == "folder" and options.folder is None:
        parser.error("folder: give a folder of images")
    parts = {
        "base": lambda: base(options.rounds),
        "compact": lambda: compact(options.rounds),
        "folder": lambda: folder(options.folder),
        "memory": memory,
    }
    print_table(parts[options.part]())
