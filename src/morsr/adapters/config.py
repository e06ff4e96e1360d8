"""Settings of one adapter set, checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from morsr.errors import ConfigError, check_fields
from morsr.functional.routing import Gate


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRConfig:
    """Mixture-of-ranks settings; the defaults are the paper's, or ours where it leaves something open.

    A plain LoRA is the set whose ranks are all shared, see `lora`.

    Args:
        num_ranks: ranks per layer, shared and routed together (40).
        num_shared: ranks that are always active (8).
        top_k: gate slots chosen per image and layer (8).
        num_zero: zero-expert slots, which take a place and output nothing (4). They lie beside the ranks' slots; the
            paper leaves open whether they are among them, which is the same as so many ranks fewer.
        targets: layers to adapt: full regular expressions or dotted suffixes of layer names, or names of presets
            in ``morsr.adapters.targets.PRESETS``, if need be with the place of the network, as ``"sd_unet@unet"``.
        modules_to_save: modules that are trained whole and saved with the set, by the same kinds of patterns.
        scale: factor on the whole update; peft's alpha / r.
        expert_rank: ranks per routed expert; 1 is the method, more makes whole LoRAs the experts (LoRA-MoE).
        router_init_std: standard deviation of the router's initial weights and biases; never zero, or ties would send
            every image to the same slots.
        gate: form of the chosen gates, see `morsr.functional.routing.route`. Open in the paper.
        init: initial ``lora_A``, "kaiming" (uniform, as torch's layers) or "gaussian" (standard deviation
            1 / num_ranks). ``lora_B`` starts at zero: freshly injected adapters leave the output bit-identical.
        logit_noise: standard deviation of the Gaussian noise on the logits at the start of training.
        logit_noise_until: fraction of the training at which the noise has fallen to 0.
        routed_dropout: share of training images whose routed gates are all 0, for trained shared ranks.
        balance: "degradation" (zero slots weighed by the rank of the severity) or "plain".
        balance_alpha: strength of the balance loss. Open in the paper.
        balance_window: images that the running share of choices remembers.

    Raises:
        ConfigError: a setting that is out of range or contradicts another one.
    """

    num_ranks: int = 40
    num_shared: int = 8
    top_k: int = 8
    num_zero: int = 4
    targets: tuple[str, ...] = ("all_unet_like",)
    modules_to_save: tuple[str, ...] = ()
    scale: float = 1.0
    expert_rank: int = 1
    router_init_std: float = 0.02
    gate: Gate = "renormalize_real"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    logit_noise: float = 1.0
    logit_noise_until: float = 0.2
    routed_dropout: float = 0.0
    balance: Literal["degradation", "plain"] = "degradation"
    balance_alpha: float = 0.01
    balance_window: int = 512

    def __post_init__(self) -> None:
        for name in ("targets", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        least = {"num_ranks": 1, "expert_rank": 1, "balance_window": 1, "router_init_std": 1e-6}
        check_fields(self, least={**least, "scale": -float("inf")})
        if self.routed_dropout >= 1:
            raise ConfigError(f"routed_dropout: expected a share below 1, got {self.routed_dropout}")
        if not self.targets:
            raise ConfigError("targets: expected at least one pattern")
        if self.num_shared > self.num_ranks or (self.num_shared == self.num_ranks and (self.top_k or self.num_zero)):
            raise ConfigError(
                f"num_shared: {self.num_shared} of {self.num_ranks} ranks leaves nothing to route; lower it, or set "
                "top_k and num_zero to 0 for a plain LoRA"
            )
        if not self.is_routed:
            return
        routed = self.num_ranks - self.num_shared
        if routed % self.expert_rank:
            raise ConfigError(f"expert_rank: {self.expert_rank} does not divide the {routed} routed ranks")
        if not 1 <= self.top_k <= self.num_slots:
            raise ConfigError(f"top_k: expected 1 to {self.num_slots} (the gate slots), got {self.top_k}")

    @classmethod
    def lora(cls, num_ranks: int, **settings: Any) -> MoRConfig:
        """A plain LoRA: all ranks are shared and nothing is routed."""
        return cls(num_ranks=num_ranks, num_shared=num_ranks, top_k=0, num_zero=0, **settings)

    @property
    def is_routed(self) -> bool:
        """Whether there is anything to route; False for a plain LoRA."""
        return self.num_shared < self.num_ranks

    @property
    def num_slots(self) -> int:
        """Gate outputs per layer N; 0 for a plain LoRA."""
        return self.num_experts + self.num_zero

    @property
    def num_experts(self) -> int:
        """Real routed experts E; 0 for a plain LoRA."""
        return (self.num_ranks - self.num_shared) // self.expert_rank

    def noise_at(self, progress: float) -> float:
        """Standard deviation of the logit noise at a fraction of the training: linear, 0 from ``logit_noise_until``."""
        if self.logit_noise_until <= 0:
            return 0.0
        return self.logit_noise * max(0.0, 1.0 - max(progress, 0.0) / self.logit_noise_until)

    def computing(self) -> dict[str, Any]:
        """The settings that change what a set computes; those of its training and its targets are left out."""
        training = ("targets", "modules_to_save", "routed_dropout", "init", "router_init", "balance", "logit_noise")
        return {key: value for key, value in self.to_dict().items() if not key.startswith(training)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and YAML."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoRConfig:
        """The opposite of ``to_dict``; settings that older releases had are passed over, unknown ones an error."""
        gone = ("balance_reduction", "dtype", "router", "router_hidden", "zero_slots")
        kept = {key: value for key, value in values.items() if key not in gone}
        try:
            if values.get("zero_slots") == "among":  # so many of the experts had no ranks
                kept["num_ranks"] -= int(kept["num_zero"]) * int(kept["expert_rank"])
            return cls(**kept)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"adapters: {error}") from error
