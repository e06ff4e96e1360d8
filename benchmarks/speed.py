"""Speed against named peers, both in the same run.

    python benchmarks/speed.py image|step [--base random:sd21] [--size 512] [--rounds 9]
    python benchmarks/speed.py base|compact [--rounds 15]
    python benchmarks/speed.py folder FOLDER
    python benchmarks/speed.py memory
    python benchmarks/speed.py degradation [--batch 16] [--size 512] [--rounds 64]

`python benchmarks/speed.py NAME --help` says what each measures; weights that are not shipped are random in the true
shapes. basicsr's chain shares all draws but the kernels within a batch, so its time varies fourfold between batches:
take many rounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from timing import compare, peak_megabytes, print_table
from torch import nn

from morsr import Restorer
from morsr.adapters import MoRConfig
from morsr.degradation import DegradationRecipe, degrade
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator
from morsr.restoring.folder import jobs_into, restore_files
from morsr.restoring.settings import Settings

TARGETS = ("sd_unet@unet", "sd_vae_encoder@vae")
UPSCALE = (
    "import resource; from PIL import Image; from morsr.cli import main; "
    "Image.effect_noise(({0}, {0}), 60).convert('RGB').save('{1}/a.png'); "
    "main(['upscale', '{1}/a.png', '{1}/b.png']); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
)


def generator(base: str, targets: tuple[str, ...], dtype: torch.dtype = torch.float32) -> OneStepGenerator:
    """A generator on a base, with 40 ranks on these targets; without adapters if there are none."""
    config, estimator = (MoRConfig(targets=targets), build_estimator("frequency")) if targets else (None, None)
    return OneStepGenerator(load_base(base, dtype=dtype), estimator, adapters=config).eval()


def image(base: str = "random:sd21", size: int = 512, rounds: int = 9) -> dict[str, Any]:
    """One image through the whole pass, autoencoder, estimator, router and merge included, over the bare base."""
    lr = torch.rand(1, 3, size // 4, size // 4)
    adapted, bare = (Restorer(generator(base, targets)) for targets in (TARGETS, ()))
    return compare(lambda: adapted(lr, tile=None), lambda: bare(lr, tile=None), rounds=rounds)


def step(base: str = "random:sd21", size: int = 512, rounds: int = 9) -> dict[str, Any]:
    """Forward and backward of the UNet, ranks of one image each, over peft's LoRA of rank 40 on the same layers, with
    the memory of one step above the weights."""
    from peft import LoraConfig, inject_adapter_in_model

    ours, bare = generator(base, TARGETS[:1]).train(), generator(base, ())
    unet = ours.base.unet
    layers = [name.removesuffix(".base_layer") for name, _ in unet.named_modules() if name.endswith(".base_layer")]
    peer = inject_adapter_in_model(LoraConfig(r=40, target_modules=layers), bare.base.unet)
    side = size // ours.base.latent_factor
    latents, text = torch.randn(1, 4, side, side), torch.randn(1, 77, unet.config.cross_attention_dim)

    def once(network: nn.Module) -> None:
        network(latents, 999, text).sample.square().mean().backward()

    def own() -> None:
        ours.route(torch.rand(1, 3, size // 4, size // 4))
        once(unet)

    found = compare(own, lambda: once(peer), rounds=rounds)
    memory = [peak_megabytes(call, torch.device("cpu")) for call in (own, lambda: once(peer))]
    return {**found, "memory ratio": memory[0] / memory[1]}


def base(rounds: int = 15) -> dict[str, Any]:
    """`tiny`, 128² to 512², over its base without adapters, with the same one-step settings."""
    restorer, lr = Restorer.from_pretrained("tiny"), torch.rand(1, 3, 128, 128)
    plain = Restorer(OneStepGenerator(load_base("tiny"), None, one_step=restorer.generator.one_step).eval())
    return compare(lambda: restorer(lr, tile=None), lambda: plain(lr, tile=None), rounds=rounds)


def compact(rounds: int = 15) -> dict[str, Any]:
    """The same over a network of compact Real-ESRGAN's shape: 34 convolutions of 64 channels, PReLU, pixel shuffle."""
    restorer, lr = Restorer.from_pretrained("tiny"), torch.rand(1, 3, 128, 128)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.PReLU(64)]
    for _ in range(32):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.PReLU(64)]
    network = nn.Sequential(*layers, nn.Conv2d(64, 48, 3, padding=1), nn.PixelShuffle(4))
    with torch.inference_mode():
        return compare(lambda: restorer(lr, tile=None), lambda: network(lr), rounds=rounds)


def folder(folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Files restored one after another over the folder as `morsr upscale` restores it, by one loaded model."""
    restorer = Restorer.from_pretrained("tiny")
    with tempfile.TemporaryDirectory() as out:
        jobs = jobs_into(Path(out, "folder"), folder)

        def one_by_one() -> None:
            for job in jobs:
                restorer.restore_file(job.source, Path(out, job.target.name))

        return compare(one_by_one, lambda: list(restore_files(restorer, jobs, Settings())), rounds=rounds)


def memory() -> dict[str, Any]:
    """Resident peak in MiB of an 8192² output over that of a 4096² one, each in a process of its own."""
    peaks = []
    for side in (2048, 1024):
        with tempfile.TemporaryDirectory() as scratch:
            line = [sys.executable, "-c", UPSCALE.format(side, scratch)]
            peaks.append(float(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return {"ours": peaks[0], "peer": peaks[1], "ratio": peaks[0] / peaks[1]}


def degradation(batch: int = 16, size: int = 512, rounds: int = 64) -> dict[str, Any]:
    """Images per second of processor time of the chain over basicsr's, on the same batches of HR images of one size."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "degradation"))
    import oracle

    torch.manual_seed(0)
    hr = torch.rand(batch, 3, size // 4, size // 4)
    hr = torch.nn.functional.interpolate(hr, scale_factor=4, mode="bicubic").clamp(0, 1)
    recipe, total = DegradationRecipe(), {degrade: 0.0, oracle.training_chain: 0.0}
    for number in range(rounds + 1):
        for chain in total:
            start = time.process_time()
            chain(hr, recipe)
            total[chain] += time.process_time() - start if number else 0.0  # the first round does not count
    ours, peer = (batch * rounds / taken for taken in total.values())
    return {"ours": ours, "peer": peer, "ratio": ours / peer}


if __name__ == "__main__":
    print_table([auto_cli([image, step, base, compact, folder, memory, degradation], as_positional=True)])
