"""The router of one adapter set: all layers' gates from the degradation scores, in one batched call.

Dimensions: L layers, B images, D scores, N slots (E real experts, then zero experts), H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.state import LayerGates, SharedState
from morsr.errors import ConfigError, InputError
from morsr.functional.balance import balance_loss, running_rate
from morsr.functional.precision import keep_float32
from morsr.functional.routing import Routing, chosen_ranks, limit_experts, rank_gates, route, router_logits, slot_load

_COMPUTE = ("auto", "gathered", "masked")  # "auto" takes what is the least work


class RoutingContext(nn.Module):
    """Router, routing and knobs of one adapter set; its layers read their row of it.

    Setting ``condition`` computes ``routing`` for all layers; setting ``routing`` reuses one, as for an image's tiles.

    Attributes:
        config: settings of the set.
        layer_names: names of its layers, in the order of the routing's first dimension.
        condition_names: what the D scores are called, if known; saved with the set.
        noise_sigma: deviation of the noise on the logits, used in training mode only.
        noise: standard normal numbers (L, B, N) for it, or None to draw them from torch's own generator.
        whole: names of parameters of the base that were trained whole with this set, or are now, and are saved with it.
        trained_whole: those among them that are trained now (`train_whole`); loading a file leaves them in.
    """

    mean: Tensor
    std: Tensor
    share: Tensor
    severity_mean: Tensor
    images_seen: Tensor

    def __init__(
        self,
        config: MoRConfig,
        layer_names: Sequence[str],
        condition_dim: int,
        *,
        name: str = "generator",
        condition_names: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.layer_names = tuple(layer_names)
        self.condition_dim = condition_dim
        self.condition_names = tuple(condition_names)
        self.noise_sigma = 0.0
        self.noise: Tensor | None = None
        self.trained_whole: tuple[str, ...] = ()
        self._whole: tuple[str, ...] = ()
        self.on_change: Callable[[], None] | None = None
        self._state: SharedState | None = None
        self._condition: Tensor | None = None
        self._routing: Routing | None = None
        self._budget: int | None = None
        self._generative = 1.0
        self._compute = "auto"
        if config.is_routed:
            self._build(device)

    @property
    def whole(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._whole, *self.trained_whole)))

    @whole.setter
    def whole(self, names: Sequence[str]) -> None:
        self._whole = tuple(names)

    def _build(self, device: torch.device | None) -> None:
        layers, slots, width = len(self.layer_names), self.config.num_slots, self.condition_dim

        def parameter(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=torch.float32).normal_(std=std))

        std = self.config.router_init_std
        if self.config.router == "mlp":
            hidden = self.config.router_hidden
            self.hidden_weight = parameter(layers, hidden, width, std=width**-0.5)
            self.hidden_bias = parameter(layers, hidden, std=width**-0.5)
            width = hidden
        self.weight = parameter(layers, slots, width, std=std)
        self.bias = parameter(layers, slots, std=std)
        for name, value in {
            "mean": torch.zeros(self.condition_dim, device=device),
            "std": torch.ones(self.condition_dim, device=device),
            "share": torch.full((layers, slots), 1 / slots, device=device),
            "severity_mean": torch.zeros((), device=device),
            "images_seen": torch.zeros((), device=device),
        }.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutingContext:
        # .to(bfloat16) of the whole model moves the router but leaves its precision: gates are float32 by contract.
        return super()._apply(keep_float32(fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        # As in SharedState: what carries autograd history is left behind.
        return {**self.__dict__, "_condition": None, "_routing": None, "on_change": None}

    def extra_repr(self) -> str:
        return (
            f"{self.name!r}, layers={len(self.layer_names)}, scores={self.condition_dim}, slots={self.config.num_slots}"
        )

    # Condition and routing

    @property
    def condition(self) -> Tensor | None:
        """Degradation scores (B, D) that the present routing was computed from, or None."""
        return self._condition

    @condition.setter
    def condition(self, scores: Tensor | None) -> None:
        if scores is None:
            self._condition = None
            self._set_routing(None)
            return
        routing = self.compute_routing(scores)
        self._condition = scores
        self._set_routing(routing)

    def compute_routing(self, scores: Tensor) -> Routing:
        """Routing of scores (B, D), without setting it.

        Raises:
            InputError: another shape or kind of number, or NaN or infinity among the scores.
            ConfigError: the set is a plain LoRA, which routes nothing.
        """
        self._check_routed("a condition")
        if (
            not isinstance(scores, Tensor)
            or scores.ndim != 2
            or scores.shape[1] != self.condition_dim
            or not scores.shape[0]
        ):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"condition: expected scores (B, {self.condition_dim}), got {got}")
        if not scores.is_floating_point():
            raise InputError(f"condition: expected floating-point scores, got {scores.dtype}")
        if not torch.compiler.is_compiling() and not scores.isfinite().all():
            bad = (~scores.isfinite()).any(1).nonzero().flatten().tolist()
            raise InputError(f"condition: the scores of images {bad} hold NaN or infinity")
        with torch.autocast(self.weight.device.type, enabled=False):
            logits = self.logits(scores)
            sigma = self.noise_sigma if self.training else 0.0
            noise = (torch.randn_like(logits) if self.noise is None else self.noise) * sigma if sigma > 0 else None
            return route(logits, self.config.top_k, noise=noise, normalization=self.config.gate)

    def logits(self, scores: Tensor) -> Tensor:
        """Logits (L, B, N) of scores (B, D), standardised first."""
        scores = (scores.to(self.weight) - self.mean) / self.std.clone()  # DDP writes to buffers in its forward
        if self.config.router == "mlp":
            scores = F.silu(router_logits(scores, self.hidden_weight, self.hidden_bias))
        return router_logits(scores, self.weight, self.bias)

    @property
    def routing(self) -> Routing | None:
        """What the router decided, before the knobs ``budget`` and ``generative``; None where no condition is set."""
        return self._routing

    @routing.setter
    def routing(self, routing: Routing | None) -> None:
        if routing is not None:
            self._check_routed("a routing")
            self._check_routing(routing)
        self._condition = None
        self._set_routing(routing)

    def _check_routed(self, what: str) -> None:
        if not self.config.is_routed:
            raise ConfigError(f"adapter set {self.name!r} is a plain LoRA and takes no {what.split()[-1]}")

    def _check_routing(self, routing: Routing) -> None:
        layers, slots, top_k = len(self.layer_names), self.config.num_slots, self.config.top_k
        batch = routing.gates.shape[1] if routing.gates.ndim == 3 else 0
        wanted = [(layers, batch, slots), (layers, batch, top_k), (layers, batch, slots), (layers, batch, top_k)]
        got = [tuple(field.shape) for field in routing]
        if got != wanted or batch < 1:
            raise InputError(f"routing: expected fields of shapes {wanted} with at least one image, got {got}")

    def _set_routing(self, routing: Routing | None) -> None:
        self._routing = routing
        self._refresh()

    # Knobs

    @property
    def budget(self) -> int | None:
        """At most so many real routed ranks per layer and image, those with the largest gates; None: no limit."""
        return self._budget

    @budget.setter
    def budget(self, ranks: int | None) -> None:
        if ranks is not None:
            self._check_routed("a budget")
            if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 0:
                raise ConfigError(f"budget: expected a whole number of ranks of at least 0, or None, got {ranks!r}")
        self._budget = ranks
        self._refresh()

    @property
    def generative(self) -> float:
        """Factor on the gates of the routed ranks: 0 leaves the shared ranks alone, 1 is as trained."""
        return self._generative

    @generative.setter
    def generative(self, factor: float) -> None:
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 <= factor < float("inf"):
            raise ConfigError(f"generative: expected a finite factor of at least 0, got {factor!r}")
        if factor != 1:
            self._check_routed("a generative")
        self._generative = float(factor)
        self._refresh()

    @property
    def compute(self) -> str:
        """How layers work: "gathered" (chosen ranks only), "masked" (all ranks times gates, the reference), or "auto".

        "auto" gathers, and in passes without gradients folds the chosen ranks into a temporary weight in layers with
        more pixels or tokens than weights to write. For several images with routings of their own it masks where at
        least half of the ranks are chosen: one convolution with all of them costs less than one per image with half.
        """
        return self._compute

    @compute.setter
    def compute(self, mode: str) -> None:
        if mode not in _COMPUTE:
            raise ConfigError(f"compute: expected one of {', '.join(_COMPUTE)}, got {mode!r}")
        self._compute = mode
        self._refresh()

    @property
    def effective_routing(self) -> Routing | None:
        """The routing with the knobs applied: what the layers compute with."""
        if self._routing is None:
            return None
        budget = None if self._budget is None else self._budget // self.config.expert_rank
        return limit_experts(self._routing, self.config.num_experts, budget=budget, generative=self._generative)

    def attach(self, state: SharedState) -> None:
        """Join the state of a model; called by inject."""
        self._state = state
        state.contexts[self.name] = self
        self._refresh()

    def _refresh(self) -> None:
        if self._state is not None:
            self._state.set_gates(self.name, self._layer_gates())
        if self.on_change is not None:
            self.on_change()

    def _layer_gates(self) -> tuple[LayerGates, ...] | None:
        config, fold = self.config, self._compute == "auto"
        if not config.is_routed:
            return (LayerGates(None, None, fold),) * len(self.layer_names)
        routing = self.effective_routing
        if routing is None:
            return None
        shape = (config.num_experts, config.num_shared, config.expert_rank)
        # unbind, not an index per layer: its backward is one stack instead of one zero-filled tensor per layer.
        if self._compute == "masked" or (fold and self._masking_pays(routing)):
            return tuple(LayerGates(None, row) for row in (rank_gates(routing, *shape) * config.scale).unbind(0))
        ranks, factors = chosen_ranks(routing, *shape)
        rows = zip(ranks.unbind(0), (factors * config.scale).unbind(0), strict=True)
        return tuple(LayerGates(*row, fold) for row in rows)

    def _masking_pays(self, routing: Routing) -> bool:
        config = self.config
        chosen = config.num_shared + routing.chosen.shape[-1] * config.expert_rank
        return routing.batch > 1 and config.stored_ranks <= 2 * chosen

    # Standardisation and balance

    @torch.no_grad()
    def set_standardization(self, mean: Tensor, std: Tensor) -> None:
        """Fix what is subtracted from the scores and what divides them, from one calibration pass before training.

        Args:
            mean: (D,) mean of the scores.
            std: (D,) their deviation; a score that hardly varies (below 1e-4) is only centred.

        Raises:
            InputError: another shape, NaN or infinity, or a negative deviation.
        """
        self._check_routed("a standardization")
        for name, value in (("mean", mean), ("std", std)):
            if tuple(value.shape) != (self.condition_dim,) or not value.isfinite().all():
                raise InputError(f"{name}: expected {self.condition_dim} finite values, got {value.tolist()}")
        if (std < 0).any():
            raise InputError(f"std: expected deviations of at least 0, got {std.tolist()}")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-4, torch.ones_like(std), std))

    @property
    def standardized(self) -> bool:
        """Whether a calibration pass has fixed what the router subtracts and divides by."""
        return self.config.is_routed and not (bool((self.mean == 0).all()) and bool((self.std == 1).all()))

    def balance_loss(self, severity: Tensor, *, update: bool = True) -> Tensor:
        """Balance loss of the present routing.

        In training mode the running share of choices and the running severity take in this batch, over all devices
        in one reduction; the probabilities stay local, so that averaging gradients over devices is exact.

        Args:
            severity: (B,) raw severity in [0, 1], never standardised.
            update: set False to leave the running values alone.

        Returns:
            Scalar loss, summed or averaged over layers as the config says.

        Raises:
            InputError: no routing is set, or severity has another shape or range.
        """
        self._check_routed("a balance loss")
        routing, config = self._routing, self.config
        if routing is None:
            raise InputError("balance_loss: set context.condition first")
        if tuple(severity.shape) != (routing.batch,):
            raise InputError(f"severity: expected ({routing.batch},), one per image, got {tuple(severity.shape)}")
        severity = severity.detach().to(routing.probabilities)
        low, high = (value.item() for value in severity.aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(f"severity: expected values in [0, 1], got {low:.4g} to {high:.4g}")
        if update and self.training:
            self._update_running(routing.chosen, severity)
        mean = torch.where(self.images_seen > 0, self.severity_mean, severity.mean())
        weight = severity / mean.clamp(min=1e-6) if config.balance == "degradation" else None
        with torch.autocast(severity.device.type, enabled=False):
            return balance_loss(
                routing.probabilities,
                self.share.clone(),  # the next micro-batch may write to it before this one's backward pass
                weight,
                config.num_experts,
                alpha=config.balance_alpha,
                reduction=config.balance_reduction,
            )

    @torch.no_grad()
    def _update_running(self, chosen: Tensor, severity: Tensor) -> None:
        count = torch.full((1,), float(severity.numel()), device=severity.device)
        load = slot_load(chosen, self.config.num_slots)
        totals = torch.cat([load.flatten(), severity.sum().float()[None], count])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        load, total, images = totals[:-2].view_as(load), totals[-2], totals[-1]
        rate = running_rate(self.images_seen, images, self.config.balance_window)
        self.share.lerp_((load / (images * self.config.top_k)).to(self.share), rate.to(self.share))
        self.severity_mean.lerp_((total / images).to(self.severity_mean), rate.to(self.severity_mean))
        self.images_seen.add_(images)
