"""The restorer: `tiny` over its bare base and over a compact network, a folder, and the peak memory of large outputs.

    python benchmarks/restorer.py base|compact [--rounds 15]
    python benchmarks/restorer.py folder FOLDER
    python benchmarks/restorer.py memory

`base`: 128² to 512², estimator, router and ranks included, over the base without adapters. `compact`: the same over a
network of compact Real-ESRGAN's shape (34 convolutions of 64 channels, PReLU, pixel shuffle; random weights). `folder`:
a folder, as `morsr upscale` restores it, over its images one after another, by one loaded model. `memory`: resident
peak in MiB of an 8192² output over that of a 4096² one, each in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from timing import compare, print_table, seconds
from torch import nn

from morsr import Restorer
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator
from morsr.restoring.folder import jobs_into, restore_files
from morsr.restoring.settings import Settings

UPSCALE = (
    "import resource; from PIL import Image; from morsr.cli import main; "
    "Image.effect_noise(({0}, {0}), 60).convert('RGB').save('{1}/a.png'); "
    "main(['upscale', '{1}/a.png', '{1}/b.png']); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
)


def base(rounds: int = 15) -> dict[str, Any]:
    """The shipped model over its base without adapters, with the same one-step settings."""
    restorer, lr = Restorer.from_pretrained("tiny"), torch.rand(1, 3, 128, 128)
    plain = Restorer(OneStepGenerator(load_base("tiny"), None, one_step=restorer.generator.one_step).eval())
    return compare(lambda: restorer(lr, tile=None), lambda: plain(lr, tile=None), rounds=rounds)._asdict()


def compact(rounds: int = 15) -> dict[str, Any]:
    """The shipped model, from image to image, over one pass of a network of compact Real-ESRGAN's shape."""
    restorer, lr = Restorer.from_pretrained("tiny"), torch.rand(1, 3, 128, 128)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.PReLU(64)]
    for _ in range(32):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.PReLU(64)]
    network = nn.Sequential(*layers, nn.Conv2d(64, 48, 3, padding=1), nn.PixelShuffle(4))
    with torch.inference_mode():
        return compare(lambda: restorer(lr, tile=None), lambda: network(lr), rounds=rounds)._asdict()


def folder(folder: Path) -> dict[str, Any]:
    """Images per second of a folder over those of its files one by one."""
    restorer = Restorer.from_pretrained("tiny")
    with tempfile.TemporaryDirectory() as out:
        jobs = jobs_into(Path(out, "folder"), folder)
        restorer.restore_file(jobs[0].source, Path(out, "first.png"))
        together = seconds(lambda: list(restore_files(restorer, jobs, Settings())))
        single = seconds(lambda: [restorer.restore_file(job.source, Path(out, job.target.name)) for job in jobs])
    return {"ours": len(jobs) / together, "peer": len(jobs) / single, "ratio": single / together}


def memory() -> dict[str, Any]:
    """Peak of the process by the side of the output."""
    peaks = []
    for side in (2048, 1024):
        with tempfile.TemporaryDirectory() as scratch:
            line = [sys.executable, "-c", UPSCALE.format(side, scratch)]
            peaks.append(float(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return {"ours": peaks[0], "peer": peaks[1], "ratio": peaks[0] / peaks[1]}


if __name__ == "__main__":
    print_table([auto_cli([base, compact, folder, memory], as_positional=True)])
