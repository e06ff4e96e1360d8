"""Watches during training how the ranks are used, and warns when experts collapse."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from morsr.functional.utilization import (
    MAX_DEAD_SHARE,
    MIN_SPREAD,
    collapsed_layers,
    dead_experts,
    load_share,
    load_spread,
    load_variation,
)
from morsr.training.callbacks.common import adapter_report, run_folder, show_picture
from morsr.training.callbacks.load_picture import load_picture

BINS = 5  # of severity, each 0.2 wide
LAYERS_TABLE = "expert_utilization.csv"


class ExpertUtilization(Callback):
    """Logs how the routed ranks are used: gate mass, effective ranks, load, dead slots, zero slots by severity.

    Every batch is added up on the device. At a log the sums of all processes are reduced and copied to the host once.
    Scalars go to every logger, the load of all slots as one histogram to TensorBoard, a picture of the load to
    TensorBoard and as `expert_load.png` into the run's folder, and one line per layer to `expert_utilization.csv`.
    A load is a slot's share of the choices over the even share: 1 is even, below 0.1 a slot is dead.

    Args:
        every_n_steps: steps between two logs.
        heatmap_every_n_steps: steps between two pictures; 0 draws none but the last.
        max_dead_share: warn when more than this share of a layer's experts is dead.
        min_spread: warn when a layer's load spread is lower: 0 means that every image takes the same slots, 1 even.
    """

    def __init__(
        self,
        *,
        every_n_steps: PositiveInt = 50,  # type: ignore[valid-type]
        heatmap_every_n_steps: NonNegativeInt = 500,  # type: ignore[valid-type]
        max_dead_share: ClosedUnitInterval = MAX_DEAD_SHARE,  # type: ignore[valid-type]
        min_spread: ClosedUnitInterval = MIN_SPREAD,  # type: ignore[valid-type]
    ) -> None:
        self.every_n_steps, self.heatmap_every_n_steps = every_n_steps, heatmap_every_n_steps
        self.max_dead_share, self.min_spread = max_dead_share, min_spread
        self.layers: dict[str, Tensor] = {}
        self.load = torch.empty(0)
        self._report: Any = None
        self._sums: RoutingSums | None = None
        self._names: tuple[str, ...] = ()
        self._folder = Path()
        self._collapsed = False
        self._logged = self._drawn = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report, self._sums, self._collapsed = adapter_report(pl_module), None, False
        self._logged = self._drawn = trainer.global_step
        self._folder = run_folder(trainer)  # here, where all processes are: the name is broadcast
        if self._report is None:
            rank_zero_info("ExpertUtilization: this model has no routing; there is nothing to watch")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        output: Any = getattr(pl_module, "last_output", None)
        if self._report is None or output is None or output.routing is None:
            return
        if self._sums is None:
            self._names = tuple(output.scores.names)
            self._sums = RoutingSums(output.routing, output.scores, self._report.config.num_zero)
        self._sums.add(output.routing, output.scores)
        if trainer.global_step // self.every_n_steps > self._logged // self.every_n_steps:
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._sums is not None and (trainer.global_step > self._drawn or self._sums.images):
            self._log(trainer, last=True)

    def _log(self, trainer: L.Trainer, *, last: bool = False) -> None:
        assert self._sums is not None
        step, self._logged = trainer.global_step, trainer.global_step
        if self._sums.images:
            scalars = self._evaluate(self._sums.take(trainer))
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram("routing/load", self.load, global_step=step)
            self._warn(step)
        every = self.heatmap_every_n_steps
        if last or (every and step // every > self._drawn // every):
            self._drawn = step
            if trainer.is_global_zero and not trainer.fast_dev_run:
                self._draw(trainer)

    def _evaluate(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Statistics by layer and over all layers, from the sums of all processes since the last log."""
        config, images = self._report.config, sums["images"].item()
        share = load_share(sums["counts"])
        slots = share.shape[1]
        zero = share[:, slots - config.num_zero :].sum(1)
        self.load = share * slots
        self._counts = sums["counts"]
        self.layers = {
            "gate_mass": sums["mass"] / images,
            "effective_ranks": sums["effective"] / images,
            "active_ranks": config.num_shared + config.top_k * config.expert_rank * (1 - zero),
            "zero_share": zero,
            "load_cv": load_variation(share),
            "max_over_mean_load": self.load.amax(1),
            "load_spread": load_spread(share, config.top_k),
            "dead_slots": dead_experts(share, config.num_zero).sum(1).double(),
        }
        found = {f"routing/{name}": values.mean().item() for name, values in self.layers.items()}
        found["routing/load_spread_min"] = self.layers["load_spread"].min().item()
        found["routing/dead_slots_max"] = self.layers["dead_slots"].max().item()
        found["routing/collapsed_layers"] = float(len(self._worst()))
        seen, zeros = sums["bins"]
        self.zero_by_severity = zeros / seen  # NaN where no image is
        for place, value in enumerate(self.zero_by_severity.tolist()):
            if value == value:
                found[f"routing/zero_share_at_severity_{place / BINS:.1f}"] = value
        mean = sums["scores"][0] / images
        deviation = (sums["scores"][1] / images - mean.square()).clamp_min(0).sqrt()
        for name, middle, width in zip((*self._names, "severity"), mean.tolist(), deviation.tolist(), strict=True):
            found |= {f"watch/degradation_{name}": middle, f"watch/degradation_{name}_deviation": width}
        return found

    def _worst(self) -> list[int]:
        config = self._report.config
        limits = {"max_dead_share": self.max_dead_share, "min_spread": self.min_spread}
        return collapsed_layers(self._counts, config.top_k, config.num_zero, **limits)

    def _warn(self, step: int) -> None:
        # Once per collapse: a warning in every log would bury the rest, and a recovery arms it again.
        collapsed = self._worst()
        if collapsed and not self._collapsed:
            worst = collapsed[0]
            rank_zero_warn(
                f"experts have collapsed in {len(collapsed)} of {len(self.load)} layers at step {step}; worst is "
                f"{self._report.layer_names[worst]}: {int(self.layers['dead_slots'][worst])} experts dead, load spread "
                f"{self.layers['load_spread'][worst]:.2f} (0: every image takes the same ranks, 1: even). A larger "
                "balance weight, more or longer router noise, or a lower router learning rate helps"
            )
        self._collapsed = bool(collapsed)

    def _draw(self, trainer: L.Trainer) -> None:
        config, names = self._report.config, self._report.layer_names
        picture = load_picture(
            self.load, self.layers["gate_mass"], self.zero_by_severity, names, config.num_zero,
            title=f"How the routed ranks are used, step {trainer.global_step}",
        )  # fmt: skip
        show_picture(trainer, picture, tag="routing/load_picture", files=[self._folder / "expert_load.png"])
        path = self._folder / LAYERS_TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.is_file()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if not begun:
                writer.writerow(
                    ["step", "layer", *self.layers, *(f"load_{slot}" for slot in range(self.load.shape[1]))]
                )
            columns = torch.cat([torch.stack(list(self.layers.values()), dim=1), self.load], dim=1)
            for name, cells in zip(names, columns.tolist(), strict=True):
                writer.writerow([trainer.global_step, name, *(f"{cell:.6g}" for cell in cells)])


class RoutingSums:
    """Sums over images, kept on the device as one tensor. Dimensions: L layers, B images, N slots, D scores.

    Args:
        routing: the first one, (L, B, N), for its shape and device.
        scores: the first ones.
        num_zero: how many of the last slots are zero slots.
    """

    def __init__(self, routing: Any, scores: Any, num_zero: int) -> None:
        layers, _, slots = routing.gates.shape
        self.real = slots - num_zero
        self.shapes = {
            "images": (1,), "counts": (layers, slots), "mass": (layers,), "effective": (layers,), "bins": (2, BINS),
            "scores": (2, scores.scores.shape[1] + 1),
        }  # fmt: skip
        self._sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        self._flat = torch.zeros(sum(self._sizes), device=routing.gates.device)
        self.images = 0

    @torch.no_grad()
    def add(self, routing: Any, scores: Any) -> None:
        """Add one batch without waiting for the device."""
        sums, chosen = self._views(self._flat), routing.chosen.flatten(1)
        gates = routing.gates[..., : self.real].float()
        mass = gates.sum(-1)
        parts = gates / mass.clamp_min(1e-12)[..., None]
        sums["images"] += len(scores.severity)
        sums["counts"].scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
        sums["mass"] += mass.sum(1)
        sums["effective"] += (torch.special.entr(parts).sum(-1).exp() * (mass > 0)).sum(1)
        zero = (routing.chosen >= self.real).float().mean((0, 2))
        place = (scores.severity.float() * BINS).long().clamp(0, BINS - 1)
        sums["bins"].scatter_add_(1, place.expand(2, -1), torch.stack([torch.ones_like(zero), zero]))
        values = torch.cat([scores.scores.float(), scores.severity.float()[:, None]], dim=1)
        sums["scores"] += torch.stack([values.sum(0), values.square().sum(0)])
        self.images += len(scores.severity)

    def take(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Sums over all processes since the last call, in float64 on the host; every process must call this."""
        total = trainer.strategy.reduce(self._flat.clone(), reduce_op="sum") if trainer.world_size > 1 else self._flat
        found = self._views(total.double().cpu())  # type: ignore[union-attr]
        self._flat.zero_()
        self.images = 0
        return found

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), flat.split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}
