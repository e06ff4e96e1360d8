"""Watches during training how the ranks are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from morsr.functional.routing import effective_ranks, gate_mass, slot_load
from morsr.functional.utilization import dead_experts, load_share, zero_share
from morsr.imaging.figures import load_figure, pixels_of
from morsr.training.callbacks.images import run_folder, show_picture

BINS = 5  # of severity, each 0.2 wide


class ExpertUtilization(Callback):
    """Logs how the routed ranks are used: gate mass, effective ranks, update, load, dead and zero slots.

    Values of every image are kept on the device. Scalars go to every logger, the load of all slots as one histogram to
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
        self._routing: Any = None  # of the last batch
        self._names: tuple[str, ...] = ()
        self._counts: list[Tensor] = []  # of the choices of every slot (L, N), by batch
        self._images: list[Tensor] = []  # what `use_of_images` gives, by batch
        self._file = Path()
        self._logged = self._drawn = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = getattr(getattr(pl_module, "generator", None), "adapters", None)
        self._report = report if report is not None and report.config.is_routed else None
        self._counts, self._images = [], []
        self._logged = self._drawn = trainer.global_step
        self._file = run_folder(trainer) / "expert_load.png"

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        outputs: Any = getattr(pl_module, "last_outputs", ())
        if self._report is None or not outputs:
            return
        for output in outputs:
            self._names = (*output.scores.names, "severity")
            self._counts.append(slot_load(output.routing.chosen, output.routing.gates.shape[-1]))
            self._routing = output.routing
            self._images.append(use_of_images(output.routing, output.scores, self._report.config.num_zero))
        if trainer.global_step // self.every_n_steps > self._logged // self.every_n_steps:
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.load) or self._counts:
            self._log(trainer, last=True)

    def _log(self, trainer: L.Trainer, *, last: bool = False) -> None:
        step = self._logged = trainer.global_step
        if self._counts:
            counts = trainer.strategy.reduce(torch.stack(self._counts).sum(0), reduce_op="sum")
            images = torch.cat(self._images)
            if trainer.world_size > 1:
                images = trainer.strategy.all_gather(images).flatten(0, 1)
            self._counts, self._images = [], []
            scalars = self._evaluate(load_share(counts.cpu().double()), images.cpu().double())
            update = trainer.strategy.reduce(self._report.routed_update(self._routing).nanmean(), reduce_op="mean")
            if not update.isnan():  # without shared ranks there is nothing to compare with
                scalars["watch_routing/routed_over_shared_update"] = float(update)
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

    def _evaluate(self, share: Tensor, images: Tensor) -> dict[str, float]:
        """Scalars by name, from the share of choices (L, N) and the use of all images since the last log."""
        config = self._report.config
        self.load = share * share.shape[1]
        mass, effective, zero = images.T[:3]
        found = {
            "gate_mass": mass.mean(),
            "effective_ranks": effective.mean(),
            "active_ranks": config.num_shared + config.top_k * config.expert_rank * (1 - zero.mean()),
            "zero_share": zero.mean(),
            "load_cv": self.load.std(1, correction=0).mean(),
            "max_over_mean_load": self.load.amax(1).mean(),
            "dead_slots": dead_experts(share, config.num_zero).sum(1).double().mean(),
        }
        bins = (images[:, -1] * BINS).long().clamp(0, BINS - 1)
        for place in bins.unique().tolist():
            found[f"zero_share_at_severity_{place / BINS:.1f}"] = zero[bins == place].mean()
        scalars = {f"watch_routing/{name}": float(value) for name, value in found.items()}
        for name, values in zip(self._names, images.T[3:], strict=True):
            scalars[f"watch/degradation_{name}"] = float(values.mean())
            scalars[f"watch/degradation_{name}_deviation"] = float(values.std(correction=0))
        return scalars


def use_of_images(routing: Any, scores: Any, num_zero: int) -> Tensor:
    """Gate mass, effective ranks and zero share of each image, means over layers, its scores and severity: (B, 4 + D).

    Args:
        routing: gates (L, B, N) and chosen slots (L, B, K).
        scores: scores (B, D) and severity (B,).
        num_zero: how many of the last slots are zero slots.
    """
    gates, real = routing.gates.float(), routing.gates.shape[-1] - num_zero
    use = gate_mass(gates, real), effective_ranks(gates, real), zero_share(routing.chosen, real)
    columns = [*(values.mean(0) for values in use), *scores.scores.float().unbind(1), scores.severity.float()]
    return torch.stack(columns, dim=1)
