"""A training step of the shipped models with all ranks masked, as it runs by itself, against the chosen ranks gathered.

    python benchmarks/masked.py [--model tiny] [--batch 8] [--window 24] [--seconds 60] [--precision float32]

Pairs are interleaved and the ratio is that of processor times, so that another job on the machine disturbs it least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from morsr.bench._pairs import paired_ratio, time_pairs
from morsr.models.loading import load_generator


def main(arguments: list[str] | None = None) -> int:
    """Print the ratio with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="images, each with a routing of its own")
    parser.add_argument("--window", type=int, default=24, help="side of the LR windows")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = load_generator(options.model).train()
    context, config = generator.context, generator.context.config
    images = torch.rand(options.batch, 3, options.window, options.window)
    half = options.precision == "bfloat16"

    def step(mode: str) -> Callable[[], None]:
        def run() -> None:
            context.compute = mode
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                restored = generator(images).sr
            restored.float().square().mean().backward()
            generator.zero_grad()

        return run

    times = time_pairs(step("auto"), step("gathered"), seconds=options.seconds, clock=1, device=torch.device("cpu"))
    ratio, low, high = paired_ratio(times.ours[:, 1], times.peer[:, 1])
    chosen = config.num_shared + config.top_k * config.expert_rank
    work = f"{options.model}, {options.batch} windows of {options.window}², {options.precision}"
    ranks = f"{chosen} of {config.stored_ranks} ranks"
    interval = f"{ratio:.3f} [{low:.3f}, {high:.3f}], {len(times.ours)} pairs"
    print(f"{work}, {ranks}: by itself / gathered {interval}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
