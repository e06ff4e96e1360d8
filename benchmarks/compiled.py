"""A training step of the shipped models with the networks compiled, as `CompiledTraining` does, against plain ones.

    python benchmarks/compiled.py [--model tiny-fidelity] [--batch 8] [--window 40] [--precision bfloat16]

Pairs are interleaved and the ratio is that of processor times, so that another job on the machine disturbs it least.
Compiling comes before the measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from morsr.bench._pairs import paired_ratio, time_pairs
from morsr.models.loading import load_generator
from morsr.training.callbacks import CompiledTraining


def main(arguments: list[str] | None = None) -> int:
    """Print the ratio with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-fidelity")
    parser.add_argument("--batch", type=int, default=8, help="images, each with a routing of its own")
    parser.add_argument("--window", type=int, default=40, help="side of the LR windows")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = load_generator(options.model).train()
    images = torch.rand(options.batch, 3, options.window, options.window)
    half = options.precision == "bfloat16"
    module = L.LightningModule()
    module.generator = generator
    callback: Any = CompiledTraining()
    plain = generator.forward
    callback.on_train_start(None, module)
    compiled = generator.forward
    callback.on_train_end(None, module)

    def step(forward: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                restored = forward(images).sr
            restored.float().square().mean().backward()
            generator.zero_grad()

        return run

    ours, peer = step(compiled), step(plain)
    ours()  # compiles
    times = time_pairs(ours, peer, seconds=options.seconds, clock=1, device=torch.device("cpu"))
    ratio, low, high = paired_ratio(times.ours[:, 1], times.peer[:, 1])
    work = f"{options.model}, {options.batch} windows of {options.window}², {options.precision}"
    print(f"{work}: compiled / plain {ratio:.3f} [{low:.3f}, {high:.3f}], {len(times.ours)} pairs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
