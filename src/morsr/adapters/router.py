"""The router of one adapter set: all layers' gates from the degradation scores, in one batched call.

Dimensions: L layers, B images, D scores, N slots (E real experts, then zero experts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.errors import InputError
from morsr.functional.losses import balance_loss
from morsr.functional.precision import keep_float32, without_autocast
from morsr.functional.routing import Routing, rank_gates, route, slot_load
from morsr.functional.severity import rank

QUANTILES = 257
"""Points of the distribution of severities that the balance loss ranks an image within."""


class Router(nn.Module):
    """Degradation scores (B, D) to the routing of all L layers, with the statistics of the balance loss.

    A router of your own overrides `logits`. A plain LoRA has a router of N = 0 slots, whose gates are the constant 1.

    Args:
        config: settings of the set.
        num_layers: adapted layers L.
        num_scores: degradation scores D.

    Attributes:
        noise_sigma: standard deviation of the noise on the logits, used in training mode only.
    """

    mean: Tensor
    std: Tensor
    share: Tensor
    severities: Tensor
    images_seen: Tensor

    def __init__(self, config: MoRConfig, num_layers: int, num_scores: int) -> None:
        super().__init__()
        self.config, self.num_layers, self.num_scores = config, num_layers, num_scores
        self.noise_sigma = 0.0
        if not config.num_slots:
            return
        slots, std = config.num_slots, config.router_init_std
        self.weight = nn.Parameter(torch.empty(num_layers, slots, num_scores, dtype=torch.float32).normal_(std=std))
        self.bias = nn.Parameter(torch.empty(num_layers, slots, dtype=torch.float32).normal_(std=std))
        self.register_buffer("mean", torch.zeros(num_scores))
        self.register_buffer("std", torch.ones(num_scores))
        self.register_buffer("share", torch.full((num_layers, slots), 1 / slots))
        self.register_buffer("severities", torch.linspace(0, 1, QUANTILES))
        self.register_buffer("images_seen", torch.zeros(()))

    @property
    def class_path(self) -> str | None:
        """Import path of a class of the user's own, which files record; None for this one."""
        kind = type(self)
        return None if kind is Router else f"{kind.__module__}.{kind.__qualname__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # .to(bfloat16) of the whole model moves the router but keeps its precision: gates are float32 by contract.
        return super()._apply(keep_float32(fn), recurse)

    def logits(self, scores: Tensor) -> Tensor:
        """Logits (L, B, N) of standardised scores (B, D)."""
        repeated = scores.expand(self.num_layers, *scores.shape)
        return torch.baddbmm(self.bias[:, None], repeated, self.weight.transpose(1, 2))

    def forward(self, scores: Tensor, noise: Tensor | None = None) -> Routing:
        """Route images.

        Args:
            scores: (B, D) degradation scores.
            noise: (L, B, N) standard normal numbers for the noise of training; None to draw them here.

        Raises:
            InputError: another shape or kind of number, or NaN or infinity among the scores.
        """
        if scores.ndim != 2 or scores.shape[1] != self.num_scores or not scores.is_floating_point():
            raise InputError(
                f"scores: expected floats (B, {self.num_scores}), got {scores.dtype} {tuple(scores.shape)}"
            )
        if not torch.compiler.is_compiling() and not scores.isfinite().all():
            raise InputError(f"scores: expected finite numbers, got {scores.tolist()}")
        with without_autocast(scores.device):
            # A clone, since DDP writes to buffers in its forward.
            logits = self.logits((scores.to(self.weight) - self.mean) / self.std.clone())
            sigma = self.noise_sigma if self.training else 0.0
            noise = (torch.randn_like(logits) if noise is None else noise) * sigma if sigma > 0 else None
            return route(logits, self.config.top_k, self.config.num_experts, noise=noise, gate=self.config.gate)

    def rank_gates(self, routing: Routing, *, strength: float = 1.0) -> Tensor:
        """Factor of every rank (L, B, R), the set's scale included."""
        config = self.config
        gates = rank_gates(routing, config.num_experts, config.num_shared, config.expert_rank, strength=strength)
        return gates * config.scale

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor, severities: Tensor | None = None) -> None:
        """Fix what is subtracted from the scores and what divides them, from one calibration pass before training.

        Args:
            mean: (D,) mean of the scores.
            std: (D,) their standard deviation; a score that hardly varies (below 1e-4) is only centred.
            severities: (I,) severities of training images, which the balance loss ranks an image within; evenly spread
                over [0, 1] by default.
        """
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-4, torch.ones_like(std), std))
        if severities is not None:
            points = torch.linspace(0, 1, QUANTILES, device=severities.device)
            self.severities.copy_(torch.quantile(severities.float(), points))

    @property
    def standardized(self) -> bool:
        """Whether a calibration pass has fixed what is subtracted and divided by."""
        return bool(self.config.num_slots) and not (bool((self.mean == 0).all()) and bool((self.std == 1).all()))

    def balance_loss(self, routing: Routing, severity: Tensor) -> Tensor:
        """Balance loss () of a routing; zero slots weigh an image by 2 × the rank of its severity, whose mean is 1.

        In training mode the running share of choices takes in this batch, over all devices in one reduction; the
        probabilities stay local, so that averaging gradients over devices is exact.

        Args:
            routing: of the current batch.
            severity: (B,) in [0, 1], never standardised.
        """
        config = self.config
        severity = severity.detach().to(routing.probabilities)
        if self.training:
            self._update(routing.chosen)
        weight = 2 * rank(severity, self.severities) if config.balance == "degradation" else None
        with without_autocast(severity.device):
            return balance_loss(
                routing.probabilities,
                self.share.clone(),  # the next micro-batch may write to it before this one's backward pass
                weight,
                config.num_experts,
                alpha=config.balance_alpha,
            )

    @torch.no_grad()
    def _update(self, chosen: Tensor) -> None:
        load = slot_load(chosen, self.config.num_slots)
        totals = torch.cat([load.flatten(), load.new_tensor([chosen.shape[1]])])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        load, images = totals[:-1].view_as(load), totals[-1]
        # a running mean: exact until `balance_window` images were seen, then exponential over so many
        rate = (images / (self.images_seen + images).clamp(max=self.config.balance_window)).clamp(max=1.0)
        self.share.lerp_((load / (images * self.config.top_k)).to(self.share), rate.to(self.share))
        self.images_seen.add_(images)
