"""Degradation on the device against basicsr's training chain: images per second, same images, same device.

    python benchmarks/degrade.py [--batch 16] [--size 512] [--device cpu] [--rounds 64]

Ours draws one set of parameters per image; basicsr's chain shares all draws but the kernels within a batch, so its
time varies fourfold between batches: take many rounds. On a CPU the processor's time counts, which other programs do
not slow down.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from timing import print_table, timer

from morsr.degradation import DegradationRecipe, degrade

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "degradation"))
import oracle


def main(batch: int = 16, size: int = 512, device: str = "cpu", rounds: int = 64) -> None:
    """Take so many batches by each chain, in turns; the size is the side of the HR images."""
    torch.manual_seed(0)
    hr = torch.rand(batch, 3, size // 4, size // 4, device=device)
    hr = torch.nn.functional.interpolate(hr, scale_factor=4, mode="bicubic").clamp(0, 1)
    recipe = DegradationRecipe()
    chains = {"morsr": degrade, "basicsr": oracle.training_chain}
    clock = time.process_time if device == "cpu" else timer
    seconds = dict.fromkeys(chains, 0.0)
    for number in range(rounds + 1):
        for name, chain in chains.items():
            start = clock()
            chain(hr, recipe)
            seconds[name] += clock() - start if number else 0.0  # the first round does not count
    row = {f"{name}, images/s": batch * rounds / total for name, total in seconds.items()}
    print_table([{**row, "ratio": seconds["basicsr"] / seconds["morsr"]}])


if __name__ == "__main__":
    auto_cli(main)
