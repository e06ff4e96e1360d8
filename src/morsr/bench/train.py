"""`morsr bench train`: memory and time of a training step, part by part, and what the whole recipe would take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from morsr.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from morsr.training.objective import Objective
    from morsr.training.phases import OneStepPhase

HELP = (
    "Run whole training steps (generator, score network, discriminator) on degraded photographs and print where their "
    "time goes, the most memory, the hours of the paper's 25,000 steps, and the ratio to a step with reconstruction "
    "losses alone. A base such as random:sd21 has the true shapes and random weights, and needs no download."
)
PAPER_STEPS, PAPER_BATCH, PAPER_SIZE = 25_000, 16, 512
GOAL = 5.0

_ORDER = (
    "degrade", "estimator and router", "encode", "UNet", "decode", "generator", "reconstruction", "vsd", "gan",
    "balance", "backward/generator", "optimizer/generator", "score", "backward/score", "optimizer/score", "encode_real",
    "discriminator", "backward/discriminator", "optimizer/discriminator",
)  # fmt: skip
_SAID = {
    "generator": "generator, the rest of its pass",
    "reconstruction": "image losses (pixels, features)",
    "vsd": "VSD: score network once, teacher twice",
    "gan": "GAN: noise, UNet's down path, heads",
    "score": "score network's own loss",
    "encode_real": "encode HR for the discriminator",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--base", default="auto", help="tiny, a folder, a hub id, or random:sd21 and the like "
                        "(default: random:sd21 on an accelerator, tiny on a processor)")  # fmt: skip
    parser.add_argument("--batch", type=int, help="images per step (default: 8 for tiny, else 16, or 1 on a processor)")
    parser.add_argument("--size", type=int, help="side of the HR crops (default: 64 for tiny, else 512)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed by part (default: %(default)s)")
    parser.add_argument("--no-warm-up", action="store_true", help="time the very first step too, and no ratio")
    parser.add_argument("--seconds", type=float, default=60.0, help="most time for the ratio (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of autocast (default: bfloat16 on an accelerator)")  # fmt: skip
    parser.add_argument("--base-dtype", choices=("float32", "bfloat16", "float16"), help="storage of frozen weights")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch (default: %(default)s)")
    parser.add_argument("--decoder", help="an AutoencoderTiny to decode with: taesd, random:taesd, a folder, an id")
    parser.add_argument("--lpips", metavar="FOLDER", help="VGG-16 weights; without, features of the base stand in")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as set)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="1 step of a small random base: does it run?")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return {"title", "settings", "rows"}.

    Raises:
        ConfigError: a number below its least, or a device that cannot be used.
    """
    import torch

    from morsr.bench._parts import device_name, peak_gigabytes
    from morsr.models.restorer import resolve_device, resolve_dtype

    device = resolve_device(args.device)
    args = _filled(args, on_cpu=device.type == "cpu")
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench = _Training(args, device, resolve_dtype(args.precision, device))
        rows = bench.parts()
        peak = peak_gigabytes(device)
        rows += [] if args.no_warm_up else bench.ratio()
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    rows += _whole_run(args, next(row["seconds"] for row in rows if row["what"] == "step"))
    settings = {
        "base": args.base,
        "batch": args.batch,
        "size": args.size,
        "precision": str(bench.precision).removeprefix("torch."),
        "base dtype": args.base_dtype or "float32",
        "checkpointing": args.checkpointing,
        "accumulate": args.accumulate,
        "decoder": args.decoder or "own",
        "trained parameters": bench.trained,
        "frozen parameters": bench.frozen,
        "peak memory GiB": round(peak, 2),
        "device": device_name(device),
        "threads": used,
        "torch": torch.__version__,
        "seed": args.seed,
    }
    return {"title": "training step: generator, score network, discriminator", "settings": settings, "rows": rows}


def _filled(args: argparse.Namespace, *, on_cpu: bool) -> argparse.Namespace:
    values = dict(vars(args))
    if args.quick:
        values |= {"base": "random:small", "batch": 2, "size": 32, "steps": 1, "seconds": 1.0}
    if values["base"] == "auto":
        values["base"] = "tiny" if on_cpu else "random:sd21"
    tiny = values["base"] == "tiny"
    values["batch"] = values["batch"] or (8 if tiny else 1 if on_cpu else 16)
    values["size"] = values["size"] or (64 if tiny else 512)
    least = {"batch": 1, "size": 32, "steps": 1, "accumulate": 1}
    for name, smallest in least.items():
        if values[name] < smallest:
            raise ConfigError(f"--{name}: expected at least {smallest}, got {values[name]}")
    if values["size"] % 4:
        raise ConfigError(f"--size: expected a multiple of 4, got {values['size']}")
    if values["seconds"] <= 0:
        raise ConfigError(f"--seconds: expected more than 0, got {values['seconds']}")
    return argparse.Namespace(**values)


def _whole_run(args: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """Hours of the paper's number of steps, as measured and at its batch and size, work taken as one per pixel."""
    hours = seconds * PAPER_STEPS / 3600
    rows = [{"what": f"{PAPER_STEPS} steps of batch {args.batch}, {args.size}²", "hours": hours}]
    factor = PAPER_BATCH / args.batch * (PAPER_SIZE / args.size) ** 2
    if factor != 1 and args.base not in ("tiny", "random:small"):
        rows.append(
            {"what": f"the same of batch {PAPER_BATCH}, {PAPER_SIZE}², scaled by pixels", "hours": hours * factor}
        )
    return rows


class _Training:
    """Generator, losses and optimizers as the training module builds them, without a trainer."""

    def __init__(self, args: argparse.Namespace, device: torch.device, precision: torch.dtype) -> None:
        import torch

        from morsr.adapters import MoRConfig
        from morsr.bench._parts import Stopwatch
        from morsr.bench.degrade import photographs
        from morsr.degradation import DegradationRecipe
        from morsr.estimators import build_estimator
        from morsr.models.backbone import load_backbone
        from morsr.models.generator import OneStepConfig, OneStepGenerator
        from morsr.training.objective import Objective

        torch.manual_seed(args.seed)
        self.args, self.device, self.precision = args, device, precision
        backbone = load_backbone(args.base, decoder=args.decoder, dtype=args.base_dtype)
        tiny = args.base == "tiny"
        encoder = "tiny_vae_encoder@vae" if type(backbone.vae).__name__ == "AutoencoderTiny" else "sd_vae_encoder@vae"
        ranks: dict[str, Any] = {"num_ranks": 24, "num_zero": 2} if tiny else {}
        self.generator = OneStepGenerator(
            backbone,
            build_estimator("frequency"),
            adapters=MoRConfig(targets=("sd_unet@unet", encoder), **ranks),
            one_step=OneStepConfig(timestep=200, scale_input=True) if tiny else OneStepConfig(),
        )
        perceptual = {"lpips": 2.0, "lpips_folder": args.lpips} if args.lpips else {"features": 1.0}
        self.full = Objective(self.generator, {"l2": 1.0, **perceptual, "vsd": 1.0, "gan": 0.1})
        self.plain = Objective(self.generator, {"l2": 1.0})
        if args.checkpointing:
            backbone.set_checkpointing()
        self.generator.to(device).train()
        for part in (self.full.restoration, self.full.discriminator):
            if part is not None:
                part.to(device)
        self.trained = sum(p.numel() for network in self.full.trained().values() for p in network)
        self.frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.watch = Stopwatch(device)
        self.hr = photographs(args.batch, args.size).to(device)
        self.recipe, self.draw = DegradationRecipe(), torch.Generator().manual_seed(args.seed)
        self.count = 0

    def parts(self) -> list[dict[str, Any]]:
        """Whole steps, every part of them timed; the step is the sum of its parts."""
        import numpy as np

        from morsr.bench._parts import PASS_PARTS, reset_peak

        phase = self._phase(self.full)
        if not self.args.no_warm_up:
            self._step(phase)
        reset_peak(self.device)
        self.watch.seconds.clear()
        self.full.part = self.watch.part
        with self.watch.watched(self.generator, PASS_PARTS, within="generator"):
            for _ in range(self.args.steps):
                with self.watch.part("the rest"):
                    self._step(phase)
        self.full.part = self.plain.part
        seconds = {name: value / self.args.steps for name, value in self.watch.seconds.items()}
        names = [name for name in _ORDER if name in seconds] + sorted(set(seconds) - set(_ORDER))
        whole = np.sum(list(seconds.values()), axis=0)
        # Shares of processor time where there is one: the steadier on a machine that does other work too.
        clock = 1 if self.device.type == "cpu" else 0
        rows = []
        for name in [*names, "step"]:
            spent = whole if name == "step" else seconds[name]
            row = {"what": _SAID.get(name, name), "seconds": float(spent[0])}
            row |= {"processor seconds": float(spent[1])} if clock else {}
            rows.append({**row, "share": float(spent[clock] / whole[clock])})
        return rows

    def ratio(self) -> list[dict[str, Any]]:
        """All losses and networks against a step with pixel and balance losses alone, in interleaved pairs."""
        import numpy as np

        from morsr.bench._pairs import paired_ratio, time_pairs

        full, plain = self._phase(self.full), self._phase(self.plain)
        clocks = time_pairs(
            lambda: self._step(full),
            lambda: self._step(plain),
            seconds=self.args.seconds,
            clock=0,
            device=self.device,
        )
        names = ("wall time", "processor time")
        rows: list[dict[str, Any]] = []
        for clock in (0, 1) if self.device.type == "cpu" else (0,):
            ours, peer = clocks.ours[:, clock], clocks.peer[:, clock]
            ratio, low, high = paired_ratio(ours, peer)
            what = f"all losses / reconstruction alone, {names[clock]}"
            rows.append(
                {"what": what, "seconds": float(np.median(ours)), "peer": float(np.median(peer)), "ratio": ratio,
                 "low": low, "high": high, "goal": GOAL, "pairs": len(ours)}
            )  # fmt: skip
        return rows

    def _phase(self, objective: Objective) -> OneStepPhase:
        from morsr.training.optim import OptimizerSettings, build_networks
        from morsr.training.phases import OneStepPhase

        def backward(loss: torch.Tensor, average: bool) -> None:
            self.scaler.scale(loss).backward()

        networks = build_networks(objective, OptimizerSettings(lr=1e-6), total_steps=-1)
        return OneStepPhase(
            objective, networks, backward=backward, accumulate=self.args.accumulate,
            # An overflowing fp16 step is skipped by the phase; the time is the same.
            update=lambda network: network.optimizer.step(), max_skipped=10**9,
        )  # fmt: skip

    def _step(self, phase: OneStepPhase) -> None:
        import torch

        from morsr.degradation import apply
        from morsr.models.draws import Draws

        with self.watch.part("degrade"), torch.no_grad():
            lr = apply(self.hr, self.recipe.sample(len(self.hr), generator=self.draw))
        draws = Draws.of_step(seed=self.args.seed, step=self.count, first=0, count=len(lr), device=self.device)
        half = self.precision != torch.float32
        with torch.autocast(self.device.type, dtype=self.precision if half else None, enabled=half):
            phase.run({"lr": lr, "hr": self.hr}, draws, step=self.count)
        self.count += 1
