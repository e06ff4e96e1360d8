"""`morsr bench inference`: one image through one step, part by part, estimator and router counted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from morsr.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from morsr.models.generator import OneStepGenerator

HELP = (
    "Time one-step restoration of an image, estimator and router counted, with the base's own decoder and with a tiny "
    "one, against the bare base without adapters; then part by part. Ranks work gathered, or merged into the weights."
)
# Milliseconds for 128² to 512² with SD 2.1 in bfloat16, merged and compiled, on an H200.
GOALS = {"own": 20.0, "tiny": 14.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--base", default="auto", help="tiny, a folder, a hub id, or random:sd21 and the like "
                        "(default: random:sd21 on an accelerator, tiny on a processor)")  # fmt: skip
    parser.add_argument("--size", type=int, default=128, help="side of the LR image (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=4.0, help="enlargement (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per pass (default: %(default)s)")
    parser.add_argument("--decoder", nargs="+", choices=("own", "tiny"), default=None,
                        help="decoders to time (default: both, for tiny its own)")  # fmt: skip
    parser.add_argument("--ranks", choices=("gathered", "merged"), default="gathered",
                        help="merged: into the weights, before the clock starts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="storage of the networks (default: half precision on an accelerator)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--rounds", type=int, default=5, help="passes timed by part (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="most time for a ratio (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as set)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small random base and 1 second: does it run?")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return {"title", "settings", "rows"}.

    Raises:
        ConfigError: a number below its least, or a device that cannot be used.
    """
    import torch

    from morsr.bench._parts import device_name, peak_gigabytes
    from morsr.models.restorer import resolve_device, resolve_dtype

    device = resolve_device(args.device)
    if args.quick:
        quick = {"base": "random:small", "size": 16, "rounds": 1, "seconds": 1.0, "decoder": ["own"]}
        args = argparse.Namespace(**{**vars(args), **quick})
    if args.base == "auto":
        args.base = "tiny" if device.type == "cpu" else "random:sd21"
    for name, least in {"size": 1, "batch": 1, "rounds": 1}.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.scale <= 0 or args.seconds <= 0:
        raise ConfigError(f"--scale, --seconds: expected more than 0, got {args.scale}, {args.seconds}")
    if args.ranks == "merged" and args.batch > 1:
        raise ConfigError("--ranks merged: the weights hold the ranks of one image; use --batch 1")
    decoders = args.decoder or (["own"] if args.base == "tiny" else ["own", "tiny"])
    dtype = resolve_dtype(args.dtype, device)
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench = _Inference(args, device, dtype, tiny_decoder="tiny" in decoders)
        rows = [row for name in decoders for row in bench.measure(name)]
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    side = round(args.size * args.scale)
    settings = {
        "base": args.base,
        "image": f"{args.size}² to {side}²",
        "batch": args.batch,
        "ranks": args.ranks,
        "ratio of": "processor time" if device.type == "cpu" else "wall time",
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": args.compile,
        "peak memory GiB": round(peak_gigabytes(device), 2),
        "device": device_name(device),
        "threads": used,
        "torch": torch.__version__,
        "seed": args.seed,
    }
    return {"title": "one-step inference against the bare base", "settings": settings, "rows": rows}


class _Inference:
    """One generator whose adapters do something, with its decoder exchanged between measurements."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, *, tiny_decoder: bool
    ) -> None:
        import torch

        from morsr.adapters import AdaptedLayer, MoRConfig
        from morsr.bench.degrade import photographs
        from morsr.estimators import build_estimator
        from morsr.models.backbone import load_backbone
        from morsr.models.generator import OneStepConfig, OneStepGenerator
        from morsr.models.loading import load_generator

        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        self.generator: OneStepGenerator
        if args.base == "tiny":
            self.generator = load_generator("tiny")
        else:
            decoder = None
            if tiny_decoder:
                decoder = "random:taesd" if args.base.startswith("random:") else "taesd"
            backbone = load_backbone(args.base, decoder=decoder)
            targets = ("sd_unet@unet", "sd_vae_encoder@vae")
            self.generator = OneStepGenerator(
                backbone, build_estimator("frequency"), adapters=MoRConfig(targets=targets), one_step=OneStepConfig()
            )
            for layer in self.generator.modules():
                if isinstance(layer, AdaptedLayer):
                    torch.nn.init.normal_(layer.sets["generator"].get_parameter("up"), std=1e-3)
        self.generator.eval().to(device)
        self.generator.backbone.to(dtype)
        self.decoder = self.generator.backbone.decoder
        if args.compile:
            backbone = self.generator.backbone
            for network in (backbone.unet, backbone.vae.encoder, backbone.vae.decoder, self.decoder):
                if network is not None:
                    network.compile()
        self.lr = photographs(args.batch, max(args.size, 8))[..., : args.size, : args.size].to(device)

    def measure(self, decoder: str) -> list[dict[str, Any]]:
        """Whole pass against the bare base in pairs, then its parts."""
        from morsr.adapters import merged

        backbone = self.generator.backbone
        backbone.decoder = self.decoder if decoder == "tiny" else None
        is_merged = self.args.ranks == "merged"
        if is_merged:
            self.generator.condition(self.lr)
        with merged(backbone) if is_merged else nullcontext():
            return [self._ratio(decoder), *self._parts(decoder)]

    def _pass(self, *, adapted: bool) -> Callable[[], None]:
        import torch

        from morsr.adapters import active_adapters
        from morsr.models.generator import enlarge, pad_to_multiple

        generator = self.generator
        size = round(self.args.size * self.args.scale)

        # Merged weights cost what the bare ones do, and another set cannot work while they are merged.
        switched = nullcontext if self.args.ranks == "merged" else lambda: active_adapters(generator.backbone, None)

        def bare() -> None:
            with torch.inference_mode(), switched():
                enlarged = pad_to_multiple(enlarge(self.lr, (size, size)), generator.multiple)
                generator.decode(generator.denoise(generator.encode(enlarged)))

        def full() -> None:
            with torch.inference_mode():
                generator(self.lr, size=(size, size))

        return full if adapted else bare

    def _ratio(self, decoder: str) -> dict[str, Any]:
        import numpy as np

        from morsr.bench._pairs import paired_ratio, time_pairs

        seconds = self.args.seconds
        clock = 1 if self.device.type == "cpu" else 0  # processor time: the steadier on a machine that is shared
        clocks = time_pairs(
            self._pass(adapted=True), self._pass(adapted=False), seconds=seconds, clock=clock, device=self.device
        )
        ratio, low, high = paired_ratio(clocks.ours[:, clock], clocks.peer[:, clock])
        # The goal is one of an H200; it says nothing about another device or size.
        stated = self.device.type == "cuda" and self.args.base.endswith("sd21") and self.args.size == 128
        return {
            "what": f"pass, {decoder} decoder / bare base",
            "milliseconds": 1e3 * float(np.median(clocks.ours[:, 0])),
            "goal ms": GOALS[decoder] if stated else None,
            "bare ms": 1e3 * float(np.median(clocks.peer[:, 0])),
            "ratio": ratio,
            "low": low,
            "high": high,
            "pairs": len(clocks.ours),
        }

    def _parts(self, decoder: str) -> list[dict[str, Any]]:
        from morsr.bench._parts import PASS_PARTS, Stopwatch

        watch, call = Stopwatch(self.device), self._pass(adapted=True)
        rest = "enlarge and the rest"
        with watch.watched(self.generator, PASS_PARTS, within=rest):
            for _ in range(self.args.rounds):
                with watch.part(rest):
                    call()
        whole = sum(spent[0] for spent in watch.seconds.values())
        return [
            {
                "what": f"{name} ({decoder} decoder)",
                "milliseconds": 1e3 * float(spent[0]) / self.args.rounds,
                "share": float(spent[0] / whole),
            }
            for name, spent in watch.seconds.items()
        ]
