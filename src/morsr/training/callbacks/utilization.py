"""Watches during training how the ranks are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from morsr.functional.routing import effective_ranks, gate_mass, slot_load
from morsr.functional.utilization import dead_experts, load_share, zero_share
from morsr.imaging.loads import load_figure, pixels_of
from morsr.training.callbacks.images import run_folder, show_picture

BINS = 5  # of severity, each 0.2 wide


class ExpertUtilization(Callback):
    """Logs how the routed ranks are used: gate mass, effective ranks, load, dead slots, zero slots by severity.

    Every batch is added up on the device. Scalars go to every logger, the load of all slots as one histogram to
    TensorBoard, and a picture of the load to TensorBoard and as `expert_load.png` into the run's folder.
    A load is a slot's share of the choices over the even share: 1 is even, below 0.1 a slot is dead.

    Args:
        every_n_steps: steps between two logs.
        heatmap_every_n_steps: steps between two pictures; 0 draws none but the last.

    Attributes:
        load: (L, N) of the last log.
    """

    def __init__(self, *, every_n_steps: PositiveInt = 50, heatmap_every_n_steps: NonNegativeInt = 500) -> None:
        self.every_n_steps, self.heatmap_every_n_steps = every_n_steps, heatmap_every_n_steps
        self.load = torch.empty(0)
        self._report: Any = None
        self._names: tuple[str, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._file = Path()
        self._logged = self._drawn = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = getattr(getattr(pl_module, "generator", None), "adapters", None)
        self._report = report if report is not None and report.config.is_routed else None
        self._sums, self._logged, self._drawn = {}, trainer.global_step, trainer.global_step
        self._file = run_folder(trainer) / "expert_load.png"

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        output: Any = getattr(pl_module, "last_output", None)
        if self._report is None or output is None or output.routing is None:
            return
        self._names = (*output.scores.names, "severity")
        sums = batch_sums(output.routing, output.scores, self._report.config.num_zero)
        self._sums = {name: self._sums[name] + value for name, value in sums.items()} if self._sums else sums
        if trainer.global_step // self.every_n_steps > self._logged // self.every_n_steps:
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.load) or self._sums:
            self._log(trainer, last=True)

    def _log(self, trainer: L.Trainer, *, last: bool = False) -> None:
        step = self._logged = trainer.global_step
        if self._sums:
            sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
            self._sums = {}
            scalars = self._evaluate({name: value.double().cpu() for name, value in sums.items()})
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram("watch_routing/load", self.load, global_step=step)
        every = self.heatmap_every_n_steps
        if (last and step > self._drawn) or (every and step // every > self._drawn // every):
            self._drawn = step
            if trainer.is_global_zero and not trainer.fast_dev_run:
                figure = load_figure(
                    {f"step {step}": self.load}, self._report.layer_names, self._report.config.num_zero,
                    label="load over the even load", middle=1.0,
                )  # fmt: skip
                show_picture(trainer, pixels_of(figure), tag="watch_routing/load_picture", files=[self._file])

    def _evaluate(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Scalars by name, from the sums over all processes since the last log."""
        config, images, share = self._report.config, sums["images"], load_share(sums["counts"])
        slots = share.shape[1]
        self.load = share * slots
        zero = share[:, slots - config.num_zero :].sum(1)
        found = {
            "gate_mass": (sums["mass"] / images).mean(),
            "effective_ranks": (sums["effective"] / images).mean(),
            "active_ranks": (config.num_shared + config.top_k * config.expert_rank * (1 - zero)).mean(),
            "zero_share": zero.mean(),
            "load_cv": self.load.std(1, correction=0).mean(),
            "max_over_mean_load": self.load.amax(1).mean(),
            "dead_slots": dead_experts(share, config.num_zero).sum(1).double().mean(),
        }
        for place, value in enumerate(sums["zeros"] / sums["bins"]):
            if not value.isnan():  # no image was as severe
                found[f"zero_share_at_severity_{place / BINS:.1f}"] = value
        mean = sums["scores"] / images
        width = (sums["squares"] / images - mean.square()).clamp_min(0).sqrt()
        scalars = {f"watch_routing/{name}": float(value) for name, value in found.items()}
        for name, middle, deviation in zip(self._names, mean.tolist(), width.tolist(), strict=True):
            scalars |= {f"watch/degradation_{name}": middle, f"watch/degradation_{name}_deviation": deviation}
        return scalars


def batch_sums(routing: Any, scores: Any, num_zero: int) -> dict[str, Tensor]:
    """Sums over the images of a batch, on its device. Dimensions: L layers, B images, N slots, D scores.

    Args:
        routing: gates (L, B, N) and chosen slots (L, B, K).
        scores: scores (B, D) and severity (B,).
        num_zero: how many of the last slots are zero slots.
    """
    slots = routing.gates.shape[-1]
    gates, severity = routing.gates.float(), scores.severity.float()
    bins = F.one_hot((severity * BINS).long().clamp(0, BINS - 1), BINS).float()
    values = torch.cat([scores.scores.float(), severity[:, None]], dim=1)
    return {
        "images": torch.ones_like(severity).sum(),
        "counts": slot_load(routing.chosen, slots),
        "mass": gate_mass(gates, slots - num_zero).sum(1),
        "effective": effective_ranks(gates, slots - num_zero).sum(1),
        "bins": bins.sum(0),
        "zeros": zero_share(routing.chosen, slots - num_zero).mean(0) @ bins,
        "scores": values.sum(0),
        "squares": values.square().sum(0),
    }
