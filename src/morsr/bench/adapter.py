"""`morsr bench adapter`: what adapters cost, against the bare UNet and against peft's LoRA on the same layers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from morsr.adapters import AdaptedLayer, MoRConfig, active_adapters, adapter_parameters, inject, merged
from morsr.bench._networks import UNETS, random_unet, routing_with_zeros, twin
from morsr.bench._pairs import paired_ratio, peak_megabytes, time_pairs
from morsr.errors import ConfigError, MissingDependencyError

HELP = (
    "Time forward passes and training steps of a UNet with MoR adapters against the bare UNet and peft's LoRA on "
    "the same layers (random weights, B filled too), in interleaved pairs until the ratio's 95 % interval is within "
    "±0.02 or the time for a row is used up."
)

ROWS = ("inject", "forward", "batch", "train", "memory", "merge", "zero", "parity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--unet", choices=tuple(UNETS), default="sd21", help="architecture (default: %(default)s)")
    parser.add_argument("--latent", type=int, help="side of the latents (default: 64 for sd21, 16 for small)")
    parser.add_argument("--batch", type=int, default=4, help="images with different routings (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=16, help="tiles that share one routing (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="most time for a ratio (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="which time the ratios and the end of a row go by; the other is reported too. Processor time is the "
        "steadier one on a machine that does other work, with --threads 1 (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile all networks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as set)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the small UNet, 1 second for a ratio: does it run?")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return {"title", "settings", "rows"}; a row holds a ratio, its interval and its goal.

    Raises:
        ConfigError: a number below its least, or a device that cannot be used.
        MissingDependencyError: peft is not installed.
    """
    if args.quick:
        args = argparse.Namespace(**{**vars(args), "unet": "small", "latent": 16, "seconds": 1.0})
    latent = args.latent or UNETS[args.unet]["sample_size"]
    for name, value, least in (("batch", args.batch, 1), ("tiles", args.tiles, 1), ("latent", latent, 8)):
        if value < least:
            raise ConfigError(f"--{name}: expected at least {least}, got {value}")
    if args.seconds <= 0:
        raise ConfigError(f"--seconds: expected more than 0, got {args.seconds}")
    if latent % 8:
        raise ConfigError(f"--latent: expected a multiple of 8, got {latent}")
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench = _Networks(args, latent)
        if args.clock == "processor" and bench.device.type != "cpu":
            raise ConfigError(f"--clock processor: a {bench.device.type} device does not work in processor time")
        rows = [row for name in ROWS if name in args.rows for row in getattr(bench, name)()]
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    settings = {
        "unet": args.unet,
        "latent": latent,
        "dtype": args.dtype,
        "compiled": args.compile,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device),
        "threads": used,
        "clock": args.clock,
        "torch": torch.__version__,
        "seed": args.seed,
        **bench.facts,
    }
    return {"title": "MoR adapters against the bare UNet and peft's LoRA", "settings": settings, "rows": rows}


class _Networks:
    """The bare UNet, its twin with MoR adapters and its twin in peft, all three over the same base weights."""

    def __init__(self, args: argparse.Namespace, latent: int) -> None:
        try:
            import peft
        except ImportError as error:
            raise MissingDependencyError('bench adapter needs peft: pip install "morsr[peft]"') from error
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        try:
            self.device = torch.device(args.device) if args.device != "auto" else accelerator or torch.device("cpu")
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]})") from error
        self.args, self.latent, self.dtype = args, latent, getattr(torch, args.dtype)
        torch.manual_seed(args.seed)
        self.bare: nn.Module = random_unet(args.unet, self.device, self.dtype)
        self.mor, self.lora = (twin(self.bare) for _ in range(2))
        start = time.perf_counter()
        report = inject(self.mor, MoRConfig(targets=("sd_unet",)), condition_dim=7)
        injected = time.perf_counter()
        self.context = report.context
        names = {entry.name for entry in report.matched}
        config = peft.LoraConfig(r=40, lora_alpha=40, target_modules="|".join(sorted(names)).replace(".", r"\."))
        self.lora = peft.get_peft_model(self.lora, config)
        self.inject_seconds = injected - start, time.perf_counter() - injected
        for layer in self.mor.modules():
            if isinstance(layer, AdaptedLayer):
                torch.nn.init.normal_(layer.sets["generator"].get_parameter("up"), std=0.01)
        for key, parameter in self.lora.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.01)
        self.facts: dict[str, Any] = {"layers": len(names)}
        self.models = {"bare": self.bare, "mor": self.mor, "lora": self.lora}
        self.calls = {key: torch.compile(model) if args.compile else model for key, model in self.models.items()}

    def inject(self) -> list[dict[str, Any]]:
        """Seconds of inject, and the bytes of base weights that it copied."""
        trained = {id(parameter) for parameter in adapter_parameters(self.mor)}
        base = {parameter.data_ptr() for parameter in self.bare.parameters()}
        frozen = [p for p in self.mor.parameters() if id(p) not in trained]
        copied = sum(p.nbytes for p in frozen if p.data_ptr() not in base)
        ours, peer = self.inject_seconds
        return [
            {"what": "inject, s; peer: peft", "ratio": ours / peer, "ours": ours, "peer": peer, "goal of ours": 5.0},
            {"what": "base weights copied by inject, MB; peer: all of them", "ours": copied / 1e6,
             "peer": sum(p.nbytes for p in frozen) / 1e6, "goal of ours": 0.0},
        ]  # fmt: skip

    def forward(self) -> list[dict[str, Any]]:
        """One image, one pass, router and gathering counted."""
        ours, bare, lora = (self._pass(name, 1) for name in ("mor", "bare", "lora"))
        return [
            self._row("forward, 1 image: MoR gathered / bare", ours, bare, goal=1.05),
            self._row("forward, 1 image: peft LoRA r40 unmerged / bare", lora, bare),
            self._operations("operations (GFLOP): MoR gathered / bare", ours, bare),
            self._operations("operations (GFLOP): peft LoRA r40 / bare", lora, bare),
        ]

    def batch(self) -> list[dict[str, Any]]:
        """Several images with different routings in one pass."""
        size = self.args.batch
        goal = 1.06 if self.device.type == "cpu" else 1.10
        what = f"forward, {size} images, {size} routings: MoR gathered / bare"
        return [self._row(what, self._pass("mor", size), self._pass("bare", size), goal=goal)]

    def train(self) -> list[dict[str, Any]]:
        """Time of a forward and backward pass, activation checkpointing off and on."""
        return [
            self._row(f"training step, checkpointing {label}: MoR / peft LoRA r40", *steps, goal=1.00)
            for label, steps in self._training()
        ]

    def memory(self) -> list[dict[str, Any]]:
        """Memory of a forward and backward pass beyond weights, activation checkpointing off and on."""
        rows = []
        for label, steps in self._training():
            ours, peer = (peak_megabytes(step, self.device) for step in steps)
            what = f"training step, checkpointing {label}, peak memory (MB): MoR / peft LoRA r40"
            rows.append({"what": what, "ratio": ours / peer, "goal": 1.02, "ours": ours, "peer": peer})
        return rows

    def _training(self) -> Iterator[tuple[str, tuple[Callable[[], None], Callable[[], None]]]]:
        for label in ("off", "on"):
            for model in (self.mor, self.lora):
                unet = model.base_model.model if model is self.lora else model
                unet.enable_gradient_checkpointing() if label == "on" else unet.disable_gradient_checkpointing()
                model.train()
            yield label, (self._step("mor"), self._step("lora"))
        for model in (self.mor, self.lora):
            model.eval().zero_grad()

    def merge(self) -> list[dict[str, Any]]:
        """Tiles of one image, with the merge counted, and from how many passes on a merge is repaid."""
        tiles = self.args.tiles
        bare = self._pass("bare", 1)

        def merge_once() -> None:
            self._condition(1)
            with merged(self.mor) as state:
                self.facts["merge backup GB"] = round(state.backup_bytes / 1e9, 3)

        self.mor.eval()
        merging = self._row("merge and restore / one bare pass", merge_once, bare)
        self._condition(1)
        with merged(self.mor):
            passing = self._row("forward, merged / bare", self._pass("mor", 1, condition=False), bare)
        gathered = self._row("forward, gathered / bare", self._pass("mor", 1), bare)
        total = {"what": f"{tiles} tiles, merge counted, per tile: MoR merged / bare", "goal": 1.02}
        for key in ("ratio", "low", "high"):
            total[key] = passing[key] + merging[key] / tiles
        saved = gathered["ratio"] - passing["ratio"]
        self.facts["merge pays from passes"] = round(merging["ratio"] / saved, 1) if saved > 0 else None
        return [merging, passing, gathered, total]

    def zero(self) -> list[dict[str, Any]]:
        """What zero slots save: in a pass nothing, for shapes are fixed; in a merge the ranks that they stand for."""
        self.mor.eval()
        config, layers = self.context.config, len(self.context.layer_names)
        most = min(config.num_zero, config.top_k)
        routings = [
            routing_with_zeros(layers, config.num_slots, config.num_experts, config.top_k, zeros) for zeros in (most, 0)
        ]

        def gather(place: int) -> Callable[[], None]:
            call = self._pass("mor", 1, condition=False)

            def passing() -> None:
                self.context.routing = routings[place].to(self.device)
                call()

            return passing

        def merge(place: int) -> Callable[[], None]:
            def merging() -> None:
                self.context.routing = routings[place].to(self.device)
                with merged(self.mor):
                    pass

            return merging

        what = f"{most} of {config.top_k} places on zero slots / none"
        return [
            self._operations(f"operations of a gathered pass (GFLOP): {what}", gather(0), gather(1)),
            self._operations(f"operations of a merge (GFLOP): {what}", merge(0), merge(1)),
            self._row(f"gathered pass: {what}", gather(0), gather(1)),
            self._row(f"merge and restore: {what}", merge(0), merge(1)),
        ]

    def parity(self) -> list[dict[str, Any]]:
        """Root mean square difference of the ways to compute one pass, over that of the adapters' whole effect."""
        self.mor.eval()
        latents, text = self._inputs(1)
        self._condition(1)

        def output() -> torch.Tensor:
            return self.mor(latents, 999, text).sample.double()

        def size(values: torch.Tensor) -> float:
            return values.square().mean().sqrt().item()

        with torch.inference_mode():
            gathered = output()
            self.context.compute = "masked"
            masked = output()
            self.context.compute = "auto"
            with merged(self.mor):
                folded = output()
            with active_adapters(self.mor, None):
                bare = output()
        rows = []
        for name, values in (("masked", masked), ("merged", folded)):
            row = {"what": f"parity: rms of {name} - gathered / rms of output", "ratio": size(values - gathered)}
            row["ratio"] /= size(gathered)
            rows.append({**row, "of the adapters' effect": size(values - gathered) / size(gathered - bare)})
        return rows

    def _condition(self, images: int) -> None:
        self.context.condition = torch.randn(images, self.context.condition_dim, device=self.device)

    def _inputs(self, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        width = UNETS[self.args.unet]["cross_attention_dim"]
        latents = torch.randn(images, 4, self.latent, self.latent, **options)
        return latents, torch.randn(images, 77, width, **options)

    def _pass(self, name: str, images: int, *, condition: bool = True) -> Callable[[], None]:
        latents, text = self._inputs(images)

        def call() -> None:
            self.models[name].eval()
            with torch.inference_mode():
                if condition and name == "mor":
                    self._condition(images)
                self.calls[name](latents, 999, text)

        return call

    def _step(self, name: str) -> Callable[[], None]:
        latents, text = self._inputs(1)
        severity = torch.full((1,), 0.5, device=self.device)

        def call() -> None:
            if name == "mor":
                self._condition(1)
            loss = self.calls[name](latents, 999, text).sample.float().square().mean()
            if name == "mor":
                loss = loss + self.context.balance_loss(severity)
            loss.backward()
            self.models[name].zero_grad()

        return call

    def _operations(self, what: str, ours: Callable[[], None], peer: Callable[[], None]) -> dict[str, Any]:
        counts = []
        for call in (ours, peer):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops() / 1e9)
        return {"what": what, "ratio": counts[0] / counts[1], "ours": counts[0], "peer": counts[1]}

    def _row(
        self, what: str, ours: Callable[[], None], peer: Callable[[], None], goal: float | None = None
    ) -> dict[str, Any]:
        place = ("wall", "processor").index(self.args.clock)
        times = time_pairs(ours, peer, seconds=self.args.seconds, clock=place, device=self.device)
        ratio, low, high = paired_ratio(times.ours[:, place], times.peer[:, place])
        row = {"what": what, "ratio": ratio, "low": low, "high": high, "goal": goal, "pairs": len(times.ours)}
        row |= {"ours": float(np.median(times.ours[:, place])), "peer": float(np.median(times.peer[:, place]))}
        if self.device.type == "cpu":
            name = "wall" if place else "processor"
            other = paired_ratio(times.ours[:, 1 - place], times.peer[:, 1 - place])
            row |= {f"{key} ({name})": value for key, value in other._asdict().items()}
        return row
