"""What a GPU does in ten minutes: degradation, a training step by parts, adapters over bare, inference; table and JSON.

    python benchmarks/gpu.py [--base random:sd21] [--size 512] [--out gpu.json]
    python benchmarks/gpu.py --base random:small --size 64 --batches 1 2 --rounds 1      # dry run on a processor

Weights are random in the true shapes, in bfloat16 on an accelerator. A part that fails (a compiler that is missing,
memory that runs out) is a row that says so. Parts stop when --minutes are over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import compare, peak_megabytes, print_table, seconds
from torch import Tensor

from adapters import TARGETS, generator
from morsr.adapters import adapter_parameters
from morsr.degradation import degrade
from morsr.models.generator import OneStepGenerator

Row = dict[str, Any]


class Bench:
    """Networks and images of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.adapted, self.bare = (generator(options.base, one, self.dtype).to(self.device) for one in (TARGETS, ()))
        self.side = options.size // 4

    def images(self, batch: int, side: int) -> Tensor:
        return torch.rand(batch, 3, side, side, device=self.device)

    def cast(self) -> torch.autocast:
        """Mixed precision as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def restore(self, network: OneStepGenerator, lr: Tensor) -> None:
        with self.cast():
            network(lr)

    def degradation(self) -> Iterator[Row]:
        batch = max(self.options.batches)
        hr = self.images(batch, self.options.size)
        degrade(hr)
        yield {"what": f"degradation, batch {batch}", "images/s": batch / seconds(lambda: degrade(hr))}

    def step(self) -> Iterator[Row]:
        """One training step by parts."""
        lr, hr = self.images(1, self.side), self.images(1, self.options.size)
        self.adapted.train()
        optimizer = torch.optim.AdamW(adapter_parameters(self.adapted.base), lr=1e-5)
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
        for batch in self.options.batches:
            lr = self.images(batch, self.side)
            ours, peer = (lambda g=g, lr=lr: self.restore(g, lr) for g in (self.adapted, self.bare))
            found, held = compare(ours, peer, rounds=self.options.rounds), peak_megabytes(ours, self.device)
            yield {"what": f"adapters over bare, batch {batch}", **found._asdict(), "MB above weights": held}

    def compiled(self) -> Iterator[Row]:
        """One-step inference with the networks compiled, over the same before."""
        if self.device.type == "cpu":
            return
        lr, best = self.images(1, self.side), []
        for warm_up in (1, 2):
            times = [seconds(lambda: self.restore(self.adapted, lr)) for _ in range(self.options.rounds + warm_up)]
            best.append(min(times[warm_up:]))
            base = self.adapted.base
            for network in (base.denoiser, base.vae.encoder, base.vae.decoder):
                network.compile()
        yield {"what": "inference, compiled over plain", "ours": best[1], "peer": best[0], "ratio": best[1] / best[0]}


def main(arguments: list[str] | None = None) -> None:
    """Run all parts that fit into the time, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sd21")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args(arguments)
    start, bench, rows = time.perf_counter(), Bench(options), list[Row]()
    for part in (bench.degradation, bench.step, bench.over_bare, bench.compiled):
        try:
            for row in part():
                rows.append(row)
                if time.perf_counter() - start > 60 * options.minutes:
                    raise RuntimeError("time is over")
        except RuntimeError as error:  # out of memory and no compiler are ones too
            rows.append({"what": f"{part.__name__}: {str(error).splitlines()[0][:80]}"})
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device)
    settings = {"base": options.base, "size": options.size, "device": name, "dtype": str(bench.dtype)}
    settings["torch"] = torch.__version__
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + "\n")
    print_table(rows)
    options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
