"""What ExpertUtilization costs: time inside the callback over the time of a training step.

    python benchmarks/callbacks.py [--steps 100] [--batch 8] [--crop 96] [--json FILE]

The first row trains adapters on a random network of the `tiny` preset's size, with scalars every 50 steps and heat maps
every 200, as `experiments/mor_tiny.yaml` does. The second feeds the callback alone with routings of Stable Diffusion's
size (290 layers, 36 slots) and states milliseconds per step, to be held against a step of your machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from morsr.adapters import MoRConfig, adapter_parameters
from morsr.estimators import build_estimator
from morsr.functional.routing import route
from morsr.models.backbone import build_backbone
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.training.callbacks import ExpertUtilization

UNET = {
    "sample_size": 32, "in_channels": 16, "out_channels": 16, "block_out_channels": [64, 80, 96], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64, "attention_head_dim": 4, "norm_num_groups": 16, "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "latent_channels": 16, "encoder_block_out_channels": [32, 32, 32], "decoder_block_out_channels": [32, 32, 32],
    "num_encoder_blocks": [0, 1, 2], "num_decoder_blocks": [2, 2, 0], "upsampling_scaling_factor": 2,
}  # fmt: skip


class Timed(ExpertUtilization):
    """Adds up the time inside the callback; work that an accelerator still has to do is waited for."""

    seconds = 0.0

    def on_train_batch_end(self, *arguments: Any) -> None:
        _wait()
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        _wait()
        self.seconds += time.perf_counter() - start


class Training(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        adapters = MoRConfig(num_ranks=24, num_shared=8, top_k=8, num_zero=2, targets=("sd_unet@unet",))
        self.generator = OneStepGenerator(
            build_backbone(UNET, VAE),
            build_estimator("frequency"),
            adapters=adapters,
            one_step=OneStepConfig(timestep=150, scale_input=True),
        )
        self.last_output: Any = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_output = self.generator(batch["lr"])
        balance = self.generator.context.balance_loss(self.last_output.scores.severity)
        return F.l1_loss(self.last_output.sr, batch["hr"]) + balance

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapter_parameters(self.generator.backbone), lr=1e-4)


def training(steps: int, batch: int, crop: int, folder: Path) -> dict[str, Any]:
    """Time inside the callback over the time of a step, on a network of the tiny preset's size."""
    pairs = [{"hr": torch.rand(3, crop, crop), "lr": torch.rand(3, crop // 4, crop // 4)} for _ in range(batch * 10)]
    watch = Timed(every_n_steps=50, heatmap_every_n_steps=200)
    trainer = L.Trainer(
        max_steps=steps, logger=[TensorBoardLogger(folder), CSVLogger(folder)], callbacks=[watch], devices=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(Training(), DataLoader(pairs, batch_size=batch))
    total = time.perf_counter() - start
    return {
        "what": f"tiny, batch {batch}, crop {crop}", "steps": steps, "step_ms": 1000 * total / steps,
        "callback_ms_per_step": 1000 * watch.seconds / steps, "share": watch.seconds / total,
    }  # fmt: skip


def large(steps: int, folder: Path) -> dict[str, Any]:
    """Milliseconds per step at the size of Stable Diffusion 2.1 with 40 ranks: 290 layers, 36 slots, batch 4."""
    layers, slots, batch = 290, 36, 4
    config = SimpleNamespace(top_k=8, num_zero=4, num_shared=8, expert_rank=1, is_routed=True)
    names = tuple(f"unet.down_blocks.{index // 60}.layer{index}" for index in range(layers))
    context = SimpleNamespace(config=config, layer_names=names)
    routing = route(torch.randn(layers, batch, slots), 8)
    scores = SimpleNamespace(scores=torch.rand(batch, 11), severity=torch.rand(batch), names=tuple("abcdefghijk"))
    output = SimpleNamespace(routing=routing, scores=scores)
    module: Any = SimpleNamespace(generator=SimpleNamespace(context=context), last_output=output)
    loggers = [TensorBoardLogger(folder), CSVLogger(folder)]
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=1, loggers=loggers, is_global_zero=True, log_dir=str(folder)
    )  # fmt: skip
    watch = Timed(every_n_steps=50, heatmap_every_n_steps=200)
    watch.on_fit_start(trainer, module)
    watch.on_train_start(trainer, module)
    for step in range(1, steps + 1):
        trainer.global_step = step
        watch.on_train_batch_end(trainer, module, None, None, step)
    return {
        "what": "290 layers, 36 slots, batch 4", "steps": steps, "callback_ms_per_step": 1000 * watch.seconds / steps,
    }  # fmt: skip


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            training(options.steps, options.batch, options.crop, Path(folder)),
            large(max(options.steps, 400), Path(folder)),
        ]
    for row in rows:
        share = f", {row['share']:.2%} of a step of {row['step_ms']:.0f} ms" if "share" in row else ""
        print(f"{row['what']}: {row['callback_ms_per_step']:.3f} ms per step{share}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
