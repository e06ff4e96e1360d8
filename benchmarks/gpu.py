"""What a GPU does in ten minutes: degradation, a training step by parts, adapters over bare, inference; table and JSON.

    python benchmarks/gpu.py [--base random:sd21] [--size 512] [--out gpu.json]
    python benchmarks/gpu.py --base random:small --size 64 --batches 1 2 --rounds 1      # dry run on a processor

Weights are random in the true shapes, in bfloat16 on an accelerator. Each part stands alone: one that fails (a compiler
that is missing, memory that runs out) is a row that says so. Parts stop when --minutes are over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import compare, peak_megabytes, print_table, seconds
from torch import Tensor

from morsr.adapters import MoRConfig, adapter_parameters
from morsr.degradation import DegradationRecipe, apply
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator

Row = dict[str, Any]
TARGETS = ("sd_unet@unet", "sd_vae_encoder@vae")


class Bench:
    """Networks and images of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.options, self.device = options, found or torch.device("cpu")
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.adapted = self.generator(MoRConfig(targets=TARGETS))
        self.bare = self.generator(None)

    def generator(self, config: MoRConfig | None) -> OneStepGenerator:
        """A generator whose frozen weights are of the run's precision."""
        base = load_base(self.options.base, dtype=self.dtype)
        estimator = None if config is None else build_estimator("frequency")
        return OneStepGenerator(base, estimator, adapters=config).to(self.device).eval()

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        """LR and HR images of noise."""
        side = self.options.size
        return tuple(torch.rand(batch, 3, size, size, device=self.device) for size in (side // 4, side))  # type: ignore[return-value]

    def cast(self) -> torch.autocast:
        """Mixed precision as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def restore(self, generator: OneStepGenerator, lr: Tensor) -> Tensor:
        """One pass without gradients."""
        with torch.inference_mode(), self.cast():
            return generator(lr).sr

    def degradation(self) -> Iterator[Row]:
        """Images per second of the whole chain."""
        batch = max(self.options.batches)
        _, hr = self.images(batch)
        recipe, draw = DegradationRecipe(), torch.Generator().manual_seed(0)

        def chain() -> None:
            apply(hr, recipe.sample(batch, generator=draw))

        chain()
        yield {"what": f"degradation, batch {batch}", "images/s": batch / seconds(chain)}

    def step(self) -> Iterator[Row]:
        """One training step by parts: forward, backward, optimizer, and its memory."""
        lr, hr = self.images(1)
        self.adapted.train()
        optimizer = torch.optim.AdamW(list(adapter_parameters(self.adapted.base)), lr=1e-5)
        kept: list[Tensor] = []

        def forward() -> None:
            with self.cast():
                kept[:] = [(self.adapted(lr).sr.float() - hr).square().mean()]

        def backward() -> None:
            kept.pop().backward()

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        def whole() -> None:
            forward(), backward(), update()

        whole()
        for part in (forward, backward, update):
            yield {"what": f"step, {part.__name__}", "ours": seconds(part)}
        yield {"what": "step, whole", "ours": seconds(whole), "MB above weights": peak_megabytes(whole, self.device)}
        self.adapted.eval()

    def over_bare(self) -> Iterator[Row]:
        """Adapters over the bare base, by batch."""
        for batch in self.options.batches:
            lr, _ = self.images(batch)
            ours, peer = (lambda g=g, lr=lr: self.restore(g, lr) for g in (self.adapted, self.bare))
            found = compare(ours, peer, rounds=self.options.rounds)
            yield {
                "what": f"adapters over bare, batch {batch}",
                **found._asdict(),
                "MB above weights": peak_megabytes(ours, self.device),
            }

    def compiled(self) -> Iterator[Row]:
        """One-step inference with the networks compiled, over the same before."""
        if self.device.type == "cpu":
            return
        lr, _ = self.images(1)
        plain = [seconds(lambda: self.restore(self.adapted, lr)) for _ in range(self.options.rounds + 1)][1:]
        for network in self.adapted.base.networks:
            network.compile()
        after = [seconds(lambda: self.restore(self.adapted, lr)) for _ in range(self.options.rounds + 2)][2:]
        ours, peer = min(after), min(plain)
        yield {"what": "inference, compiled over plain", "ours": ours, "peer": peer, "ratio": ours / peer}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts that fit into the time and return settings and rows."""
    start, bench, rows = time.perf_counter(), Bench(options), []
    parts: list[Callable[[], Iterator[Row]]] = [bench.degradation, bench.step, bench.over_bare, bench.compiled]
    for part in parts:
        try:
            for row in part():
                rows.append(row)
                if time.perf_counter() - start > 60 * options.minutes:
                    rows.append({"what": "time is over"})
                    break
        except RuntimeError as error:  # out of memory, no compiler
            rows.append({"what": f"{part.__name__}: {str(error).splitlines()[0][:80]}"})
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device)
    settings = {
        "base": options.base,
        "size": options.size,
        "device": name,
        "dtype": str(bench.dtype),
        "torch": torch.__version__,
    }
    return {"settings": settings, "rows": rows}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sd21")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table and write the JSON."""
    options = parse(arguments)
    result = run(options)
    print(", ".join(f"{key} {value}" for key, value in result["settings"].items()) + "\n")
    print_table(result["rows"])
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
