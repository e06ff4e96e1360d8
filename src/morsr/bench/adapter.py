"""`morsr bench adapter`: what adapters cost, against the bare UNet and against peft's LoRA on the same layers."""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from morsr.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from torch import nn

HELP = (
    "Time forward passes and training steps of a UNet with MoR adapters against the bare UNet and peft's LoRA on "
    "the same layers (random weights, B filled too), in interleaved pairs until the ratio's 95 % interval is within "
    "±0.02 or the time for a row is used up."
)

# The published config of stabilityai/stable-diffusion-2-1-base, and a network of the same classes to try the benchmark.
_UNETS: dict[str, dict[str, Any]] = {
    "sd21": {
        "sample_size": 64,
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "small": {
        "sample_size": 16,
        "attention_head_dim": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "use_linear_projection": True,
    },
}
_VAE: dict[str, Any] = {
    "encoder_block_out_channels": [4],
    "decoder_block_out_channels": [4],
    "num_encoder_blocks": [1],
    "num_decoder_blocks": [1],
}
ROWS = ("forward", "batch", "train", "merge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--unet", choices=tuple(_UNETS), default="sd21", help="architecture (default: %(default)s)")
    parser.add_argument("--latent", type=int, help="side of the latents (default: 64 for sd21, 16 for small)")
    parser.add_argument("--batch", type=int, default=4, help="images with different routings (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=16, help="tiles that share one routing (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="most time for a row (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile all networks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as set)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the small UNet, 1 second for a row: does it run?")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return {"title", "settings", "rows"}; a row holds a ratio, its interval and its goal.

    Raises:
        ConfigError: a number below its least, or a device that cannot be used.
        MissingDependencyError: peft is not installed.
    """
    if args.quick:
        args = argparse.Namespace(**{**vars(args), "unet": "small", "latent": 16, "seconds": 1.0})
    latent = args.latent or _UNETS[args.unet]["sample_size"]
    for name, value, least in (("batch", args.batch, 1), ("tiles", args.tiles, 1), ("latent", latent, 8)):
        if value < least:
            raise ConfigError(f"--{name}: expected at least {least}, got {value}")
    if args.seconds <= 0:
        raise ConfigError(f"--seconds: expected more than 0, got {args.seconds}")
    if latent % 8:
        raise ConfigError(f"--latent: expected a multiple of 8, got {latent}")
    import torch

    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench = _Networks(args, latent)
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
        "torch": torch.__version__,
        "seed": args.seed,
        **bench.facts,
    }
    return {"title": "MoR adapters against the bare UNet and peft's LoRA", "settings": settings, "rows": rows}


class _Networks:
    """The bare UNet, its twin with MoR adapters and its twin in peft, all three over the same base weights."""

    def __init__(self, args: argparse.Namespace, latent: int) -> None:
        import torch

        from morsr.adapters import AdaptedLayer, MoRConfig, inject
        from morsr.models.backbone import build_backbone

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
        with torch.device(self.device):
            self.bare: nn.Module = build_backbone(_UNETS[args.unet], _VAE).unet.to(self.dtype).requires_grad_(False)
        self.mor, self.lora = (_twin(self.bare) for _ in range(2))
        start = time.perf_counter()
        report = inject(self.mor, MoRConfig(targets=("sd_unet",)), condition_dim=7)
        seconds = time.perf_counter() - start
        self.context = report.context
        names = {entry.name for entry in report.matched}
        config = peft.LoraConfig(r=40, lora_alpha=40, target_modules="|".join(sorted(names)).replace(".", r"\."))
        self.lora = peft.get_peft_model(self.lora, config)
        for layer in self.mor.modules():
            if isinstance(layer, AdaptedLayer):
                torch.nn.init.normal_(layer.sets["generator"].get_parameter("up"), std=0.01)
        for key, parameter in self.lora.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.01)
        self.facts: dict[str, Any] = {"layers": len(names), "inject seconds": round(seconds, 2)}
        self.models = {"bare": self.bare, "mor": self.mor, "lora": self.lora}
        self.calls = {key: torch.compile(model) if args.compile else model for key, model in self.models.items()}

    def forward(self) -> list[dict[str, Any]]:
        """One image, one pass, router and gathering counted."""
        ours, bare, lora = (self._pass(name, 1) for name in ("mor", "bare", "lora"))
        rows = [
            self._row("forward, 1 image: MoR gathered / bare", ours, bare, goal=1.05),
            self._row("forward, 1 image: peft LoRA r40 unmerged / bare", lora, bare),
        ]
        return rows + self._operations()

    def batch(self) -> list[dict[str, Any]]:
        """Several images with different routings in one pass."""
        size = self.args.batch
        goal = 1.06 if self.device.type == "cpu" else 1.10
        what = f"forward, {size} images, {size} routings: MoR gathered / bare"
        return [self._row(what, self._pass("mor", size), self._pass("bare", size), goal=goal)]

    def train(self) -> list[dict[str, Any]]:
        """Forward and backward pass, activation checkpointing off and on."""
        rows = []
        for on in (False, True):
            for model in (self.mor, self.lora):
                unet = model.base_model.model if model is self.lora else model
                unet.enable_gradient_checkpointing() if on else unet.disable_gradient_checkpointing()
                model.train()
            label = f"training step, checkpointing {'on' if on else 'off'}: MoR / peft LoRA r40"
            ours, peer = self._step("mor"), self._step("lora")
            rows.append(self._row(f"{label}, time", ours, peer, goal=1.00))
            sizes = [self._memory(step) for step in (ours, peer)]
            rows.append(
                {
                    "what": f"{label}, memory",
                    "ratio": sizes[0] / sizes[1],
                    "goal": 1.02,
                    "ours": sizes[0],
                    "peer": sizes[1],
                }
            )
        for model in (self.mor, self.lora):
            model.eval().zero_grad()
        return rows

    def merge(self) -> list[dict[str, Any]]:
        """Tiles of one image, with the merge counted, and from how many passes on a merge is repaid."""
        from morsr.adapters import merged

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
        return [merging, passing, total]

    def _condition(self, images: int) -> None:
        import torch

        self.context.condition = torch.randn(images, self.context.condition_dim, device=self.device)

    def _inputs(self, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        width = _UNETS[self.args.unet]["cross_attention_dim"]
        latents = torch.randn(images, 4, self.latent, self.latent, **options)
        return latents, torch.randn(images, 77, width, **options)

    def _pass(self, name: str, images: int, *, condition: bool = True) -> Callable[[], None]:
        import torch

        latents, text = self._inputs(images)

        def call() -> None:
            self.models[name].eval()
            with torch.inference_mode():
                if condition and name == "mor":
                    self._condition(images)
                self.calls[name](latents, 999, text)

        return call

    def _step(self, name: str) -> Callable[[], None]:
        import torch

        latents, text = self._inputs(1)
        severity = torch.full((1,), 0.5, device=self.device)

        def call() -> None:
            self.models[name].zero_grad()
            if name == "mor":
                self._condition(1)
            loss = self.calls[name](latents, 999, text).sample.float().square().mean()
            if name == "mor":
                loss = loss + self.context.balance_loss(severity)
            loss.backward()

        return call

    def _memory(self, step: Callable[[], None]) -> float:
        """Megabytes of a training step: the peak on a CUDA device, else what autograd keeps for the backward pass."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        base = {parameter.untyped_storage().data_ptr() for parameter in self.bare.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in base:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        return sum(kept.values()) / 1e6

    def _operations(self) -> list[dict[str, Any]]:
        """Floating-point operations of a pass, and what chosen zero slots save where ranks are merged."""
        from torch.utils.flop_counter import FlopCounterMode

        from morsr.adapters import merged

        counts = {}
        for name in ("bare", "mor"):
            with FlopCounterMode(display=False) as counter:
                self._pass(name, 1)()
            counts[name] = counter.get_total_flops()
        self.mor.eval()
        self._condition(1)
        with merged(self.mor) as state:
            run_of = state.ranks_run / state.ranks_most
        self.facts["ranks run of ranks chosen"] = round(run_of, 3)
        ratio = counts["mor"] / counts["bare"]
        return [{"what": "operations of a pass: MoR gathered / bare", "ratio": ratio, "ours": counts["mor"] / 1e9,
                 "peer": counts["bare"] / 1e9}]  # fmt: skip

    def _row(
        self, what: str, ours: Callable[[], None], peer: Callable[[], None], goal: float | None = None
    ) -> dict[str, Any]:
        own, other = self._pairs(ours, peer)
        ratio, low, high = _paired_ratio(own[:, 0], other[:, 0])
        row = {"what": what, "ratio": ratio, "low": low, "high": high, "goal": goal, "pairs": len(own)}
        row |= {"ours": float(np.median(own[:, 0])), "peer": float(np.median(other[:, 0]))}
        if self.device.type == "cpu":
            # Seconds of all threads: the steadier figure on a machine that does other work too.
            names = ("ratio (processor time)", "low (processor time)", "high (processor time)")
            row |= dict(zip(names, _paired_ratio(own[:, 1], other[:, 1]), strict=True))
        return row

    def _pairs(self, ours: Callable[[], None], peer: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, 2) wall and processor seconds of both calls, in turn, the order changing from pair to pair."""
        self._timed(ours), self._timed(peer)
        own: list[tuple[float, float]] = []
        other: list[tuple[float, float]] = []
        end = time.perf_counter() + self.args.seconds
        while len(own) < 5 or time.perf_counter() < end:
            calls = [(ours, own), (peer, other)]
            for call, times in calls[:: -1 if len(own) % 2 else 1]:
                times.append(self._timed(call))
            if len(own) >= 5:
                _, low, high = _paired_ratio(np.array(own)[:, 0], np.array(other)[:, 0])
                if high - low <= 0.04:
                    break
        return np.array(own), np.array(other)

    def _timed(self, call: Callable[[], None]) -> tuple[float, float]:
        import torch

        gc.collect()
        wall, processor = time.perf_counter(), time.process_time()
        call()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - wall, time.process_time() - processor


def _twin(model: nn.Module) -> nn.Module:
    """Another tree of modules over the same parameters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _paired_ratio(own: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of the ratios of pairs, and its 95 % interval by Student's t."""
    logs = np.log(own / other)
    freedom = len(logs) - 1
    # The quantile of Student's t by its expansion around the normal one, good to 0.3 % from four degrees of freedom on.
    quantile = 1.96 + 2.372 / freedom + 2.822 / freedom**2 + 2.556 / freedom**3
    half = quantile * logs.std(ddof=1) / len(logs) ** 0.5
    low, middle, high = (float(np.exp(logs.mean() + sign * half)) for sign in (-1, 0, 1))
    return middle, low, high
