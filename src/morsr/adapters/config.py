"""Settings of one adapter set, checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Any

from morsr.errors import ConfigError

_CHOICES = {
    "router": ("linear", "mlp"),
    "gate": ("renormalize", "softmax"),
    "zero_slots": ("beside", "among"),
    "init": ("kaiming", "gaussian"),
    "balance": ("degradation", "plain"),
    "balance_reduction": ("sum", "mean"),
    "dtype": ("float32", "bfloat16", "float16", "base"),
}

# The method and the baselines of its ablation, as settings of the same code.
_KINDS: dict[str, dict[str, Any]] = {
    "mor": {},
    "mor_v2": {"balance": "plain"},
    "mor_v1": {"num_zero": 0, "balance": "plain"},
    "lora_moe": {"expert_rank": 4, "num_shared": 8, "top_k": 2, "num_zero": 0, "balance": "plain"},
    "lora": {"num_shared": None, "top_k": 0, "num_zero": 0, "balance": "plain"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRConfig:
    """Mixture-of-ranks settings; the defaults are the paper's, or ours where it leaves something open.

    Args:
        num_ranks: ranks per layer, shared and routed together (40).
        num_shared: ranks that always work (8).
        top_k: gate slots chosen per image and layer (8).
        num_zero: zero-expert slots, which take a place and output nothing (4). They count slots, never ranks.
        targets: layers to adapt: full regular expressions or dotted suffixes of layer names, or names of presets
            in ``morsr.adapters.PRESETS``, if need be with the place of the network, as ``"sd_unet@unet"``.
        scale: factor on the whole update; peft's alpha / r.
        expert_rank: ranks per routed expert; 1 is the method, more makes whole LoRAs the experts (LoRA-MoE).
        router: "linear" or "mlp", from the scores to the slots, per layer.
        router_hidden: width of the MLP router's hidden layer.
        router_init_std: deviation of the router's first weights and biases; never zero, or ties would send every
            image to the same slots.
        gate: "renormalize" (chosen gates sum to top_k, so that an even gate equals a plain LoRA of that rank) or
            "softmax" (as they are, which a router with top_k 1 needs to learn from more than the balance). Open in the
            paper.
        zero_slots: "beside" the real experts (slots = experts + num_zero) or "among" them (num_zero of the experts
            have no ranks). Open in the paper.
        init: first values of the down projections, "kaiming" (uniform, as torch's layers) or "gaussian" (deviation
            1 / num_ranks). The up projections start at zero, so a fresh set changes nothing.
        logit_noise: deviation of the Gaussian noise on the logits at the start of training.
        logit_noise_until: fraction of the training at which the noise has fallen to 0.
        balance: "degradation" (zero slots weighed by severity) or "plain".
        balance_alpha: strength of the balance loss. Open in the paper.
        balance_reduction: "sum" or "mean" over layers.
        balance_window: images that the running share of choices and the running severity remember.
        dtype: of the stored ranks: "float32", "bfloat16", "float16" or "base" (each layer's own). They are computed
            in the dtype of the layer's input; the router stays in float32.

    Raises:
        ConfigError: a setting that is out of range or contradicts another one.
    """

    num_ranks: int = 40
    num_shared: int = 8
    top_k: int = 8
    num_zero: int = 4
    targets: tuple[str, ...] = ("all_unet_like",)
    scale: float = 1.0
    expert_rank: int = 1
    router: str = "linear"
    router_hidden: int = 32
    router_init_std: float = 0.02
    gate: str = "renormalize"
    zero_slots: str = "beside"
    init: str = "kaiming"
    logit_noise: float = 1.0
    logit_noise_until: float = 0.2
    balance: str = "degradation"
    balance_alpha: float = 0.01
    balance_reduction: str = "sum"
    balance_window: int = 512
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ConfigError(f"targets: expected a list of patterns, got the single string {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not all(isinstance(target, str) and target for target in self.targets):
            raise ConfigError(f"targets: expected at least one non-empty pattern, got {self.targets!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        lowest = {"num_ranks": 1, "num_shared": 0, "top_k": 0, "num_zero": 0, "expert_rank": 1, "router_hidden": 1}
        for name, least in {**lowest, "balance_window": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        for name in ("scale", "router_init_std", "logit_noise", "logit_noise_until", "balance_alpha"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
                raise ConfigError(f"{name}: expected a finite number, got {value!r}")
            if name != "scale" and value < 0:
                raise ConfigError(f"{name}: expected a number of at least 0, got {value!r}")
        self._check_slots()

    def _check_slots(self) -> None:
        if self.is_routed and self.router_init_std == 0:
            raise ConfigError(
                "router_init_std: 0 would tie all logits and send every image to the same slots; try 0.02"
            )
        if self.num_shared > self.num_ranks or (self.num_shared == self.num_ranks and (self.top_k or self.num_zero)):
            raise ConfigError(
                f"num_shared={self.num_shared} leaves nothing to route of num_ranks={self.num_ranks}; "
                "lower it, or set top_k=0 and num_zero=0 for a plain LoRA"
            )
        if not self.is_routed:
            return
        if (self.num_ranks - self.num_shared) % self.expert_rank:
            raise ConfigError(
                f"expert_rank={self.expert_rank} does not divide the {self.num_ranks - self.num_shared} routed ranks "
                f"(num_ranks={self.num_ranks} - num_shared={self.num_shared})"
            )
        if self.num_experts < 1:
            raise ConfigError(
                f"num_zero={self.num_zero} among {self.num_slots} slots leaves no real expert; "
                "lower num_zero or set zero_slots='beside'"
            )
        if not 1 <= self.top_k <= self.num_slots:
            raise ConfigError(f"top_k={self.top_k}: expected 1 to {self.num_slots}, the number of gate slots")

    @classmethod
    def of_kind(cls, kind: str, **settings: Any) -> MoRConfig:
        """Settings of the method or of a baseline in its ablation.

        Args:
            kind: "mor", "mor_v2" (plain balance), "mor_v1" (no zero slots), "lora_moe" (8 LoRAs of rank 4 as experts, 2
                chosen, 8 shared ranks) or "lora" (all ranks shared).
            settings: fields that differ from the kind's.
        """
        if kind not in _KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        values = {**_KINDS[kind], **settings}
        if values.get("num_shared", 0) is None:
            values["num_shared"] = values.get("num_ranks", cls.num_ranks)
        return cls.from_dict(values)

    @property
    def is_routed(self) -> bool:
        """Whether there is anything to route; False for a plain LoRA."""
        return self.num_shared < self.num_ranks

    @property
    def num_slots(self) -> int:
        """Gate outputs per layer N; 0 for a plain LoRA."""
        if not self.is_routed:
            return 0
        experts = (self.num_ranks - self.num_shared) // self.expert_rank
        return experts + (self.num_zero if self.zero_slots == "beside" else 0)

    @property
    def num_experts(self) -> int:
        """Real routed experts E."""
        return self.num_slots - self.num_zero

    @property
    def stored_ranks(self) -> int:
        """Ranks that have weights; fewer than num_ranks where zero slots stand among the experts."""
        return self.num_shared + self.num_experts * self.expert_rank

    def noise_at(self, progress: float) -> float:
        """Deviation of the logit noise at a fraction of the training: linear, 0 from ``logit_noise_until`` on."""
        if self.logit_noise_until <= 0:
            return 0.0
        return self.logit_noise * max(0.0, 1.0 - max(progress, 0.0) / self.logit_noise_until)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and YAML."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoRConfig:
        """The opposite of ``to_dict``; unknown settings are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown adapter settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)
