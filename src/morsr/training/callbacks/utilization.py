"""Watches during training how the ranks are used, and warns when experts collapse."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from morsr.errors import ConfigError
from morsr.functional.layer_names import block_of, flow_order
from morsr.functional.utilization import (
    MAX_DEAD_SHARE,
    MIN_SPREAD,
    Utilization,
    collapsed_layers,
    spearman,
    summarize,
)
from morsr.training.callbacks.common import last_routing, routing_context, run_folder
from morsr.training.callbacks.plot import heat_map_image
from morsr.training.callbacks.window import RoutingWindow, WindowSums

LAYERS_TABLE = "expert_utilization.csv"


class ExpertUtilization(Callback):
    """Logs load, entropy, dead experts, zero slots and active ranks, over all layers, by network block and by layer.

    Every micro-batch is added up on the device; at a log the sums of all processes are gathered by one call and
    copied to the host once. Scalars go to every logger of the trainer, heat maps (layers x slots) to TensorBoard, and
    what every single layer does, with the load of each slot, to expert_utilization.csv in the run's folder.
    Degradation scores are logged beside, as mean and deviation over the same images: a deviation near zero means that
    the router has nothing to tell images apart by. A model without routing is reported once and left alone.

    Args:
        every_n_steps: optimizer steps between two logs.
        heatmap_every_n_steps: optimizer steps between two heat maps and two entries of the table; 0 for none.
        severity_window: last images, per process, that the correlation of zero share and severity is taken over.
        max_dead_share: warn when more than this share of a layer's experts is dead (under 0.1 of the even load).
        min_spread: warn when a layer's load spread is lower: 0 means that every image takes the same slots, 1 even.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        heatmap_every_n_steps: int = 500,
        severity_window: int = 1024,
        max_dead_share: float = MAX_DEAD_SHARE,
        min_spread: float = MIN_SPREAD,
    ) -> None:
        if every_n_steps < 1 or severity_window < 3 or heatmap_every_n_steps < 0:
            raise ConfigError(
                "ExpertUtilization: expected every_n_steps >= 1, severity_window >= 3 and heatmap_every_n_steps >= 0, "
                f"got {every_n_steps}, {severity_window} and {heatmap_every_n_steps}"
            )
        if not (0 <= max_dead_share <= 1 and 0 <= min_spread <= 1):
            raise ConfigError(
                "ExpertUtilization: expected max_dead_share and min_spread in [0, 1], "
                f"got {max_dead_share} and {min_spread}"
            )
        self.every_n_steps = every_n_steps
        self.heatmap_every_n_steps = heatmap_every_n_steps
        self.severity_window = severity_window
        self.max_dead_share = max_dead_share
        self.min_spread = min_spread
        self.latest: Utilization | None = None
        self.layer_names: tuple[str, ...] = ()
        self.severity = self.zero_share = torch.empty(0)
        self._context: Any = None
        self._folder = Path()
        self._window: RoutingWindow | None = None
        self._previous: WindowSums | None = None
        self._score_names: tuple[str, ...] = ()
        self._collapsed = False
        self._logged = self._drawn = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._context = routing_context(pl_module)
        if self._context is None or not self._context.config.is_routed:
            self._context = None
            rank_zero_info("ExpertUtilization: this model has no routing; there is nothing to watch")
            return
        self.layer_names = tuple(self._context.layer_names)
        self._folder = run_folder(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window, self._previous, self._collapsed = None, None, False
        self._logged = self._drawn = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen = last_routing(pl_module) if self._context is not None else None
        if seen is None:
            return
        routing, scores = seen
        if self._window is None:
            self._score_names = tuple(scores.names)
            layers, _, slots = routing.probabilities.shape
            self._window = RoutingWindow(
                layers=layers,
                slots=slots,
                scores=len(scores.names),
                last=self.severity_window,
                num_real=slots - self._context.config.num_zero,
                device=routing.probabilities.device,
            )
        self._window.add(routing, scores.scores, scores.severity)
        # Only a finished optimizer step can make this true: under accumulation the micro-batches just add up.
        if trainer.global_step // self.every_n_steps > self._logged // self.every_n_steps:
            self._log(trainer, self._window)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._window is not None and (self._window.images or self._previous is not None):
            self._log(trainer, self._window, final=True)

    def _log(self, trainer: L.Trainer, window: RoutingWindow, *, final: bool = False) -> None:
        new = window.images > 0
        sums = window.take(trainer)
        # A run shorter than one window still gets its numbers; else the odd end of a window would only add noise.
        to_loggers = not final or self._previous is None
        if final and self._previous is not None:
            # The last window may hold a few images only; the one before it makes the closing picture steady.
            sums = sums.joined(self._previous)
        self._previous = sums
        self._logged = trainer.global_step
        self.severity, self.zero_share = sums.severity, sums.zero_share.mean(1)
        config = self._context.config
        usage = summarize(
            sums.counts,
            sums.probability,
            sums.weighted,
            images=sums.images,
            severity_sum=sums.severity_sum,
            top_k=config.top_k,
            num_zero=config.num_zero,
            num_shared=config.num_shared,
            expert_rank=config.expert_rank,
        )
        self.latest = usage
        collapsed = collapsed_layers(
            sums.counts,
            config.top_k,
            config.num_zero,
            max_dead_share=self.max_dead_share,
            min_spread=self.min_spread,
        )
        if to_loggers:
            scalars = self._scalars(sums, usage, len(collapsed))
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)
        self._warn(collapsed, usage, trainer.global_step)
        every = self.heatmap_every_n_steps
        # At the end, unless the last log was drawn and nothing has been seen since: it would be the same lines again.
        due = final and (new or self._drawn < trainer.global_step)
        if every and (due or trainer.global_step // every > self._drawn // every):
            self._drawn = trainer.global_step
            if trainer.is_global_zero:
                self._draw(trainer, sums, usage)

    def _scalars(self, sums: WindowSums, usage: Utilization, collapsed: int) -> dict[str, float]:
        scalars = {f"routing/{name}": value for name, value in usage.scalars().items()}
        scalars["routing/collapsed_layers"] = float(collapsed)
        correlation = spearman(self.severity, self.zero_share)
        if correlation == correlation:  # NaN where all images agree: no point rather than a broken curve
            scalars["routing/zero_severity_spearman"] = correlation
        mean = sums.scores / sums.images
        deviation = (sums.squares / sums.images - mean.square()).clamp_min(0).sqrt()
        for name, middle, width in zip(self._score_names, mean.tolist(), deviation.tolist(), strict=True):
            scalars |= {f"degradation/{name}": middle, f"degradation_deviation/{name}": width}
        scalars["degradation/severity"] = sums.severity_sum / sums.images
        return scalars | self._by_block(usage)

    def _draw(self, trainer: L.Trainer, sums: WindowSums, usage: Utilization) -> None:
        """Heat map to TensorBoard, and one line per layer to the table in the run's folder."""
        image = heat_map_image(usage.load[flow_order(self.layer_names)], self._context.config.num_zero)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("routing/load", image, global_step=trainer.global_step, dataformats="HWC")
        path = self._folder / LAYERS_TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.is_file()
        vectors = usage.vectors()
        vectors["zero_severity_spearman"] = torch.tensor(
            [spearman(self.severity, shares) for shares in sums.zero_share.T], dtype=torch.float64
        )
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if not begun:
                slots = [f"load_{slot}" for slot in range(usage.load.shape[1])]
                writer.writerow(["step", "layer", "images", *vectors, *slots])
            columns = [*(values.tolist() for values in vectors.values()), *usage.load.T.tolist()]
            for name, *cells in zip(self.layer_names, *columns, strict=True):
                texts = ["" if cell != cell else f"{cell:.6g}" for cell in cells]
                writer.writerow([trainer.global_step, name, usage.images, *texts])

    def _by_block(self, usage: Utilization) -> dict[str, float]:
        blocks: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(self.layer_names):
            blocks[block_of(name)].append(index)
        scalars = {}
        for block, rows in blocks.items():
            scalars[f"routing_active_ranks/{block}"] = usage.ranks[rows].mean().item()
            scalars[f"routing_load_entropy/{block}"] = usage.entropy[rows].mean().item()
            scalars[f"routing_dead_share/{block}"] = usage.dead[rows].mean().item()
        return scalars

    def _warn(self, collapsed: list[int], usage: Utilization, step: int) -> None:
        # Once per collapse: a warning in every log would bury the rest, and a recovery arms it again.
        if collapsed and not self._collapsed:
            worst = collapsed[0]
            rank_zero_warn(
                f"experts have collapsed in {len(collapsed)} of {len(usage.spread)} layers at step {step}; worst is "
                f"{self.layer_names[worst]}: {usage.dead[worst]:.0%} of its experts dead, load spread "
                f"{usage.spread[worst]:.2f} (0: every image takes the same ranks, 1: even). A larger balance weight, "
                "more or longer router noise, or a lower router learning rate helps"
            )
        self._collapsed = bool(collapsed)
