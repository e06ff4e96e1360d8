"""What a GPU does: degradation, a training step by parts, adapters over bare, inference; table and JSON.

    python benchmarks/gpu.py [--base random:sd21] [--size 512] [--out gpu.json]
    python benchmarks/gpu.py --base random:small --size 64 --batches [1,2] --rounds 1      # dry run on a processor

Weights are random in the true shapes, in bfloat16 on an accelerator. A part that fails (a compiler that is missing,
memory that runs out) is a row that says so. The JSON is written after each part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from speed import TARGETS, generator
from timing import compare, peak_megabytes, print_table, seconds
from torch import Tensor

from morsr.adapters import adapter_parameters
from morsr.degradation import degrade


def main(
    base: str = "random:sd21", size: int = 512, batches: tuple[int, ...] = (1, 4, 16), rounds: int = 5,
    out: Path = Path("gpu.json"),
) -> None:  # fmt: skip
    """Run all parts, print the table and write the JSON."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    adapted, bare = (generator(base, targets, dtype).to(device) for targets in (TARGETS, ()))

    def images(batch: int, side: int) -> Tensor:
        return torch.rand(batch, 3, side, side, device=device)

    def call(network: Any, lr: Tensor) -> Any:
        """A pass in mixed precision, as in training."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return network(lr)

    def degradation() -> Iterator[dict[str, Any]]:
        hr = images(max(batches), size)
        degrade(hr)
        yield {"what": f"degradation, batch {len(hr)}", "images/s": len(hr) / seconds(lambda: degrade(hr))}

    def step() -> Iterator[dict[str, Any]]:
        lr, hr = images(1, size // 4), images(1, size)
        adapted.train()
        optimizer = torch.optim.AdamW(adapter_parameters(adapted.base), lr=1e-5)
        kept: list[Tensor] = []

        def forward() -> None:
            kept[:] = [(call(adapted, lr).sr.float() - hr).square().mean()]

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
        yield {"what": "step, whole", "ours": seconds(whole), "MB above weights": peak_megabytes(whole, device)}

    @torch.inference_mode()
    def over_bare() -> Iterator[dict[str, Any]]:
        adapted.eval()
        for batch in batches:
            lr = images(batch, size // 4)
            ours, peer = (lambda network=network, lr=lr: call(network, lr) for network in (adapted, bare))
            found, held = compare(ours, peer, rounds=rounds), peak_megabytes(ours, device)
            yield {"what": f"adapters over bare, batch {batch}", **found, "MB above weights": held}

    @torch.inference_mode()
    def compiled() -> Iterator[dict[str, Any]]:
        """One-step inference with the networks compiled, over the same before."""
        lr, best = images(1, size // 4), []
        for warm_up in (1, 2):
            best.append(min([seconds(lambda: call(adapted, lr)) for _ in range(rounds + warm_up)][warm_up:]))
            for network in (adapted.base.denoiser, adapted.base.vae.encoder, adapted.base.vae.decoder):
                network.compile()
        yield {"what": "inference, compiled over plain", "ours": best[1], "peer": best[0], "ratio": best[1] / best[0]}

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    settings = {"base": base, "size": size, "device": name, "dtype": str(dtype), "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    for part in (degradation, step, over_bare, compiled)[: 3 if device.type == "cpu" else 4]:
        try:
            rows.extend(part())
        except RuntimeError as error:  # out of memory and no compiler are ones too
            rows.append({"what": f"{part.__name__}: {str(error).splitlines()[0][:80]}"})
        out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + "\n")
    print_table(rows)


if __name__ == "__main__":
    auto_cli(main)
