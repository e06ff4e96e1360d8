"""Degradation on the device against basicsr's training chain: images per second, same images, same device.

    python benchmarks/degrade.py [--batch 16] [--size 512] [--device cpu] [--rounds 12]

Ours draws one set of parameters per image; basicsr's chain shares all draws but the kernels within a batch.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from morsr.degradation import DegradationRecipe, apply, sample_keys

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "degradation"))
import oracle


def main() -> None:
    """Print a table of both chains and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="side of the HR images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=12, help="batches per chain, taken in turns")
    options = parser.parse_args()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    recipe, epoch = DegradationRecipe(), iter(range(10**9))
    hr = torch.rand(options.batch, 3, options.size // 4, options.size // 4, device=options.device)
    hr = torch.nn.functional.interpolate(hr, scale_factor=4, mode="bicubic").clamp(0, 1)
    theirs = oracle.Chain(recipe)

    def ours() -> None:
        apply(hr, recipe.sample(sample_keys(0, next(epoch), torch.arange(options.batch))))

    chains = {"morsr": ours, "basicsr": lambda: theirs(hr)}
    # On a CPU the processor's time counts, which other programs do not slow down.
    clock = {"timer": time.process_time} if hr.device.type == "cpu" else {}
    threads = torch.get_num_threads()
    timers = {name: Timer("chain()", globals={"chain": chain}, num_threads=threads, **clock)
              for name, chain in chains.items()}  # fmt: skip
    seconds = dict.fromkeys(timers, 0.0)
    for _ in range(options.rounds):
        for name, timer in timers.items():
            seconds[name] += timer.timeit(1).mean
    for name, total in seconds.items():
        print(f"{name:8} {options.batch * options.rounds / total:8.1f} images/s")
    print(f"ratio    {seconds['basicsr'] / seconds['morsr']:8.2f}")


if __name__ == "__main__":
    main()
