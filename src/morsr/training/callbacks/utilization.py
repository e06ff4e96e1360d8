"""Watches during training how the ranks are used, and warns when experts collapse."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from morsr.errors import ConfigError
from morsr.functional.layer_names import block_of, flow_order
from morsr.functional.utilization import Utilization, spearman, summarize, zero_share
from morsr.training.callbacks.common import last_routing, routing_context
from morsr.training.callbacks.plot import heat_map_image

# Below this many choices per slot in a window, an unused slot may be chance and no warning is given.
MIN_EVEN_COUNT = 10


class ExpertUtilization(Callback):
    """Logs load, entropy, dead experts, zero slots and active ranks, over all layers and by network block.

    Every micro-batch is added up on the device; at a log the sums of all processes are gathered by one call and
    copied to the host once. Scalars go to every logger of the trainer, heat maps (layers x slots) to TensorBoard.
    A model without routing is reported once and left alone.

    Args:
        every_n_steps: optimizer steps between two logs.
        heatmap_every_n_steps: optimizer steps between two heat maps; 0 for none.
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
        max_dead_share: float = 0.5,
        min_spread: float = 0.25,
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
        self._flat: Tensor | None = None
        self._collapsed = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._context = routing_context(pl_module)
        if self._context is None or not self._context.config.is_routed:
            self._context = None
            rank_zero_info("ExpertUtilization: this model has no routing; there is nothing to watch")
            return
        self.layer_names = tuple(self._context.layer_names)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._flat, self._previous, self._collapsed = None, None, False
        self._images = self._position = 0
        self._logged = self._drawn = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen = last_routing(pl_module) if self._context is not None else None
        if seen is None:
            return
        self._add(*seen)
        # Only a finished optimizer step can make this true: under accumulation the micro-batches just add up.
        if trainer.global_step // self.every_n_steps > self._logged // self.every_n_steps:
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._context is not None and (self._images or self._previous is not None):
            self._log(trainer, final=True)

    @torch.no_grad()
    def _add(self, routing: Any, severity: Tensor) -> None:
        chosen, probabilities = routing.chosen, routing.probabilities.detach().float()
        layers, batch, slots = probabilities.shape
        if self._flat is None:
            window = self.severity_window
            self._shape = (layers, slots)
            self._flat = torch.zeros(3 * layers * slots + 2 + 2 * window, device=probabilities.device)
            sums, self._totals, pairs = self._flat.split((3 * layers * slots, 2, 2 * window))
            self._counts, self._probability, self._weighted = sums.view(3, layers, slots)
            self._pairs = pairs.view(2, window).fill_(torch.nan)
        severity = severity.detach().float()
        flat = chosen.flatten(1)
        self._counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
        self._probability += probabilities.sum(1)
        self._weighted += torch.einsum("lbn,b->ln", probabilities, severity)
        self._totals[1] += severity.sum()
        self._images += batch
        shares = zero_share(chosen, slots - self._context.config.num_zero).mean(0)
        kept = min(batch, self.severity_window)
        if self._position + kept > self.severity_window:
            self._position = 0
        ring = slice(self._position, self._position + kept)
        self._pairs[:, ring] = torch.stack([severity, shares])[:, -kept:]
        self._position += kept

    def _gather(self, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        """Sums of all processes (3LN + 2,) and their pairs of severity and zero share (2, I), both on the host."""
        assert self._flat is not None
        self._totals[0] = self._images
        gathered = trainer.strategy.all_gather(self._flat) if trainer.world_size > 1 else self._flat
        host = gathered.reshape(-1, self._flat.numel()).cpu().double()
        cut = self._flat.numel() - 2 * self.severity_window
        pairs = host[:, cut:].reshape(-1, 2, self.severity_window).transpose(0, 1).flatten(1)
        self._flat[:cut].zero_()
        self._images = 0
        return host[:, :cut].sum(0), pairs[:, ~pairs[0].isnan()]

    def _log(self, trainer: L.Trainer, *, final: bool = False) -> None:
        sums, pairs = self._gather(trainer)
        # A run shorter than one window still gets its numbers; else the odd end of a window would only add noise.
        to_loggers = not final or self._previous is None
        if final and self._previous is not None:
            # The last window may hold a few images only; the one before it makes the closing picture steady.
            sums = sums + self._previous
        self._previous = sums  # type: ignore[assignment]
        self._logged = trainer.global_step
        self.severity, self.zero_share = pairs
        config = self._context.config
        layers, slots = self._shape
        counts, probability, weighted = sums[:-2].view(3, layers, slots)
        images, severity_sum = int(sums[-2].item()), sums[-1].item()
        usage = summarize(
            counts,
            probability,
            weighted,
            images=images,
            severity_sum=severity_sum,
            top_k=config.top_k,
            num_zero=config.num_zero,
            num_shared=config.num_shared,
            expert_rank=config.expert_rank,
        )
        self.latest = usage
        collapsed = self._find_collapse(usage, even_count=images * config.top_k / slots)
        scalars = {f"routing/{name}": value for name, value in usage.scalars().items()}
        scalars["routing/collapsed_layers"] = float(len(collapsed))
        correlation = spearman(self.severity, self.zero_share)
        if correlation == correlation:  # NaN where all images agree: no point rather than a broken curve
            scalars["routing/zero_severity_spearman"] = correlation
        scalars |= self._by_block(usage)
        if to_loggers:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)
        self._warn(collapsed, usage, trainer.global_step)
        every = self.heatmap_every_n_steps
        if every and (final or trainer.global_step // every > self._drawn // every):
            self._drawn = trainer.global_step
            image = heat_map_image(usage.load[flow_order(self.layer_names)], config.num_zero)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    logger.experiment.add_image(
                        "routing/load", image, global_step=trainer.global_step, dataformats="HWC"
                    )

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

    def _find_collapse(self, usage: Utilization, *, even_count: float) -> list[int]:
        if even_count < MIN_EVEN_COUNT:
            return []
        bad = (usage.dead > self.max_dead_share) | (usage.spread < self.min_spread)
        return bad.nonzero().flatten().tolist()

    def _warn(self, collapsed: list[int], usage: Utilization, step: int) -> None:
        # Once per collapse: a warning in every log would bury the rest, and a recovery arms it again.
        if collapsed and not self._collapsed:
            worst = min(collapsed, key=lambda layer: usage.spread[layer].item())
            rank_zero_warn(
                f"experts have collapsed in {len(collapsed)} of {len(usage.spread)} layers at step {step}; worst is "
                f"{self.layer_names[worst]}: {usage.dead[worst]:.0%} of its experts dead, load spread "
                f"{usage.spread[worst]:.2f} (0: every image takes the same ranks, 1: even). A larger balance weight, "
                "more or longer router noise, or a lower router learning rate helps"
            )
        self._collapsed = bool(collapsed)
