"""What `inject` returns: one adapter set on a model, through which images are routed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.layer import AdaptedLayer, Switch
from morsr.adapters.router import Router
from morsr.errors import ConfigError, InputError
from morsr.functional.routing import Routing


@dataclass(eq=False, repr=False)
class InjectionReport:
    """One adapter set on a model: its layers, its router and its present routing.

    Attributes:
        switch: of the model.
        name, config: of the set.
        router: from scores to gates; it has no slots in a plain LoRA.
        layers, layer_names: the adapted layers, in the order of the routing's first dimension.
        skipped: names of the Linear and Conv2d layers that no target matched.
        copies: the set's own copies of the modules that it trains whole, by name.
        score_names: what the scores are called, if known; saved with the set.
        routing: what the router decided last, before `strength`; None before the first `route` and for a plain LoRA.
    """

    switch: Switch
    name: str
    config: MoRConfig
    router: Router
    layers: list[AdaptedLayer]
    layer_names: tuple[str, ...]
    skipped: tuple[str, ...]
    copies: dict[str, nn.Module] = field(default_factory=dict)
    score_names: tuple[str, ...] = ()
    routing: Routing | None = None
    _strength: float = 1.0

    def __post_init__(self) -> None:
        self.switch.reports[self.name] = self
        self._apply()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routing": self.routing and self.routing.detach()}

    @property
    def is_routed(self) -> bool:
        """Whether the set has gate slots; a plain LoRA has none."""
        return self.config.is_routed

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the modules that the set trains whole."""
        return tuple(self.copies)

    @property
    def strength(self) -> float:
        """Factor on the gates of the routed ranks: 0 leaves the shared ranks alone, 1 is as trained."""
        return self._strength

    @strength.setter
    def strength(self, factor: float) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ConfigError(f"strength: expected a finite factor of at least 0, got {factor!r}")
        if factor != 1 and not self.is_routed:
            raise ConfigError("strength: a plain LoRA has no routed ranks to scale")
        self._strength = float(factor)
        self._apply()

    def route(
        self, scores: Tensor | Routing | None, *, noise: Tensor | None = None, keep: Tensor | None = None
    ) -> Routing | None:
        """Route a batch of images in all layers; it holds until the next call.

        Args:
            scores: degradation scores (B, D), a routing to use as it is, or None to forget the present one.
            noise: see `Router.forward`.
            keep: (B,) factors of the routed gates, 0 for an image that the shared ranks restore alone.

        Raises:
            InputError: scores or a routing of another shape, or scores that are not finite.
            ConfigError: weights are merged, or the set is a plain LoRA.
        """
        if any(layer.merged for layer in self.layers):
            raise ConfigError("weights are merged for the present routing; leave merged(...) first")
        if scores is not None and not self.is_routed:
            raise ConfigError(f"adapter set {self.name!r} is a plain LoRA, which routes nothing")
        if isinstance(scores, Routing):
            shape = (len(self.layer_names), scores.batch, self.config.num_slots)
            if tuple(scores.gates.shape) != shape:
                raise InputError(f"routing: expected gates {shape}, got {tuple(scores.gates.shape)}")
            self.routing = scores
        elif scores is None or isinstance(scores, Tensor):
            self.routing = None if scores is None else self.router(scores, noise)
            if self.routing is not None and keep is not None:
                self.routing = self.routing._replace(gates=self.routing.gates * keep[:, None])
        else:
            raise InputError(f"scores: expected a tensor (B, {self.router.num_scores}), got {type(scores).__name__}")
        self._apply()
        return self.routing

    def _apply(self) -> None:
        gates = None
        if self.routing is not None:
            # unbind, not an index per layer: its backward is one stack rather than a zero-filled tensor per layer.
            gates = self.router.rank_gates(self.routing, strength=self._strength).unbind(0)
        self.switch.gates = {**self.switch.gates, self.name: gates}

    def __str__(self) -> str:
        """The adapted layers, one a line, and what is trained."""
        width = max(map(len, self.layer_names))
        lines = [
            f"{name:{width}}  {type(layer.torch_layer(None)).__name__:6}  {'×'.join(map(str, layer.weight.shape))}"
            for name, layer in zip(self.layer_names, self.layers, strict=True)
        ]
        modules = [self.router, *(layer.ranks(self.name) for layer in self.layers)]
        trained = sum(p.numel() for module in modules for p in module.parameters())
        counted = f"{len(lines)} layers adapted, {len(self.skipped)} skipped"
        return "\n".join([*lines, f"{counted}: {self.config.stored_ranks} ranks each, {trained:,} parameters"])
