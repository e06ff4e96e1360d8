"""Memory of a training step from shapes alone, on the meta device: the table of docs/scaling.md.

    python benchmarks/memory.py table [--bases "[sd21, sd3, flux2-klein]"] [--size 512]
    python benchmarks/memory.py run sd3 --size 256     # its network once at true size on this processor
    python benchmarks/memory.py step sd21 --size 256   # one training step with every loss

Estimates. Counted are what autograd keeps of one image's pass through encoder, network, decoder, LPIPS and the
discriminator's features, as bfloat16 mixed precision and fused attention store it, the frozen weights in bfloat16, and
the trained parameters with their gradients and AdamW's moments. Workspaces, fragments and the driver come on top.
"""

from __future__ import annotations

import resource
import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from jsonargparse import auto_cli
from timing import print_table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from morsr.adapters import MoRConfig, adapter_parameters, inject
from morsr.models.bases import Base, load_base
from morsr.models.draws import Draws
from morsr.models.losses import Distillation, Gan, Losses, Weight
from morsr.training.module import OneStepSRModule
from morsr.training.step import OneStepPhase

CARDS = (16, 24, 48, 80)
PARTS = (16, 8, 4, 2, 1)
FITS = 0.9  # share of a card that the estimate may take
HALF = torch.bfloat16


class Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class MixedPrecision(TorchFunctionMode):
    """The casts of CUDA's autocast to bfloat16, which the meta device has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("group_norm", "layer_norm"):
            return func(*(one.float() if isinstance(one, Tensor) else one for one in args), **kwargs)
        if name in ("linear", "conv2d") and args[1].dtype == HALF:
            return func(*(one.to(HALF) if isinstance(one, Tensor) else one for one in args), **kwargs)
        if name == "scaled_dot_product_attention":
            return Attention.apply(*(one.to(HALF) for one in (*args, *kwargs.values())[:3]))
        return func(*args, **kwargs)


def widened(product: Any) -> Any:
    """A product of torch that takes bfloat16 tensors in float32, for a processor without fast kernels for bfloat16.

    Weights and what lies between the layers stay in bfloat16; a layer's float32 copy lives as long as its activations.
    """

    def compute(first: Tensor, *others: Any, **named: Any) -> Tensor:
        if first.dtype != HALF:
            return product(first, *others, **named)
        wide = [one.float() if isinstance(one, Tensor) else one for one in (first, *others)]
        return product(*wide, **{k: v.float() if isinstance(v, Tensor) else v for k, v in named.items()}).to(HALF)

    return compute


class Ledger:
    """Bytes that autograd keeps, every storage once and weights left out; blocks that are recomputed apart."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {one.untyped_storage()._cdata: one for one in (*model.parameters(), *model.buffers())}
        self.kept = self.block = 0

    def count(self, tensor: Tensor) -> Tensor:
        """Add a tensor; it is held, so that no other storage takes its address."""
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            self.known[key] = tensor
            self.kept += tensor.untyped_storage().nbytes()
        return tensor

    def recompute(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A checkpointed block: its inputs are kept, and the largest one is whole once, in the backward pass."""
        for one in args:
            if isinstance(one, Tensor):
                self.count(one)
        before, self.kept = self.kept, 0
        with torch.autograd.graph.saved_tensors_hooks(self.count, lambda one: one):
            output = function(*args, **kwargs)
        self.block, self.kept = max(self.block, self.kept), before
        return output


def adapted(name: str) -> Base:
    """A base in bfloat16 with the paper's 40 ranks, every one of them used, and a score network's 4."""
    with torch.device("meta"):
        base = load_base(f"random:{name}", dtype="bfloat16").eval().requires_grad_(False)
        encoder = "dc_vae_encoder@vae" if "AutoencoderDC" in base.autoencoders else "sd_vae_encoder@vae"
        inject(base, MoRConfig.lora(40, targets=(*base.targets, encoder)))
        inject(base, MoRConfig.lora(4, targets=base.targets), name="score")
    return base


def activations(base: Base, size: int, *, recomputed: bool) -> int:
    """Bytes that one image's pass keeps for the backward pass."""
    ledger = Ledger(base)
    for network in (base.denoiser, base.vae):
        if recomputed and network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing(ledger.recompute)
    with torch.device("meta"):
        vgg = torchvision.models.vgg16(weights=None).features.requires_grad_(False)
        image, t = torch.empty(1, 3, size, size), torch.full((1,), 250)
    ledger.known |= {one.untyped_storage()._cdata: one for one in vgg.parameters()}
    base.train()
    with torch.autograd.graph.saved_tensors_hooks(ledger.count, lambda one: one), MixedPrecision():
        z0 = base.clean(base.encode(image), t)
        vgg(base.decode(z0).float())
        base.features(z0, t)
    return ledger.kept + ledger.block


def run(name: str, size: int = 512) -> None:
    """Forward and backward pass at true size with checkpointing: weights in bfloat16, arithmetic in float32."""
    torch.set_default_dtype(HALF)
    base = load_base(f"random:{name}").train()
    torch.set_default_dtype(torch.float32)
    report = inject(base, MoRConfig(targets=base.targets), condition_dim=7)
    base.set_checkpointing()
    side = size // base.latent_factor
    z = torch.randn(1, base.in_channels, side, side)
    names = ("linear", "conv2d", "scaled_dot_product_attention")
    with mock.patch.multiple(F, **{one: widened(getattr(F, one)) for one in names}):
        report.route(torch.rand(1, 7))
        base.predict(z, 250).square().mean().backward()


def step(name: str, size: int = 512) -> None:
    """One training step with every loss and all three networks, batch 1, float32; VGG-16 has random weights too."""
    base, vgg = load_base(f"random:{name}"), torchvision.models.vgg16(weights=None)
    with mock.patch("torchvision.models.vgg16", return_value=vgg):
        module = OneStepSRModule(
            base=base, adapters=MoRConfig(targets=(*base.targets, "sd_vae_encoder@vae")),
            losses=Losses(lpips=Weight(weight=2.0), vsd=Distillation(), gan=Gan()),
        ).train()  # fmt: skip
        module.configure_model()
    router = module.generator.adapters.router
    router.standardize(torch.zeros(router.num_scores), torch.ones(router.num_scores), torch.linspace(0, 1, 9))
    phase = OneStepPhase(
        module.objective, module.build_networks(), backward=lambda loss, average: loss.backward(),
        update=lambda network: network.optimizer.step(), **module.step_settings,
    )  # fmt: skip
    batch = {"lr": torch.rand(1, 3, size // 4, size // 4), "hr": torch.rand(1, 3, size, size)}
    draws = Draws.of_step(seed=0, step=0, first=0, count=1, device=torch.device("cpu"))
    phase.run(batch, draws, step=0)


def table(bases: tuple[str, ...] = ("sd21", "sdxl", "sd3", "flux2-klein"), size: int = 512) -> None:
    """Print the estimates, in GB, and the largest part of a batch of 16 that fits on each card."""
    rows = []
    for name in bases:
        base = adapted(name)
        trained = sum(one.numel() for set_name in ("generator", "score") for one in adapter_parameters(base, set_name))
        frozen = sum(one.numel() * one.element_size() for one in base.parameters()) - 4 * trained
        kept, again = (activations(base, size, recomputed=recomputed) for recomputed in (False, True))
        row = {"frozen": frozen, "trained": 16 * trained, "kept": kept, "recomputed": again}
        rows.append({"base": name, **{key: f"{value / 1e9:.2f}" for key, value in row.items()}})
        for card in CARDS:
            room = FITS * card * 1e9 - frozen - 16 * trained
            rows[-1][f"{card} GB"] = next((str(part) for part in PARTS if part * again <= room), "none")
    print_table(rows)


if __name__ == "__main__":
    auto_cli([table, run, step], as_positional=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.process_time():.0f} processor seconds with the start, peak {peak:.1f} GiB")
