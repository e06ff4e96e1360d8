"""Put adapter sets on a model, route images through them, find them again, and switch between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.layer import AdaptedLayer, Ranks, Switch
from morsr.adapters.router import Router
from morsr.adapters.targets import matching
from morsr.errors import ConfigError, InputError
from morsr.functional.lowrank import routed_update
from morsr.functional.routing import Routing

RouterFactory = Callable[[MoRConfig, int, int], Router]


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

    @torch.no_grad()
    def routed_update(self, routing: Routing) -> Tensor:
        """Size of the routed ranks' update over that of the shared ranks, (L, B); see `functional.lowrank`."""
        gates, ranks = self.router.rank_gates(routing), [layer.sets[self.name] for layer in self.layers]
        sizes = [
            routed_update(row, one.lora_A, one.lora_B, self.config.num_shared)
            for row, one in zip(gates, ranks, strict=True)
        ]
        return torch.stack(sizes)

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
            f"{name:{width}}  {type(layer.base_layer).__name__:6}  {'×'.join(map(str, layer.weight.shape))}"
            for name, layer in zip(self.layer_names, self.layers, strict=True)
        ]
        modules = [self.router, *(layer.sets[self.name] for layer in self.layers)]
        trained = sum(p.numel() for module in modules for p in module.parameters())
        counted = f"{len(lines)} layers adapted, {len(self.skipped)} skipped"
        return "\n".join([*lines, f"{counted}: {self.config.num_ranks} ranks each, {trained:,} parameters"])


def modules_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules, wrappers for what they wrap, with their names in the bare model."""
    for key, child in original(model)._modules.items():
        if child is not None:
            yield prefix + key, child
            yield from modules_of(child, f"{prefix}{key}.")


def original(module: nn.Module) -> Any:
    """The base's own module."""
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def inject(
    model: nn.Module,
    config: MoRConfig,
    *,
    condition_dim: int = 0,
    name: str = "generator",
    score_names: Sequence[str] = (),
    router: RouterFactory = Router,
    layers: Sequence[str] | None = None,
    saved: Sequence[str] | None = None,
) -> InjectionReport:
    """Put an adapter set on the layers of a model that its targets name, and freeze the model's own weights.

    The first set of a model becomes the active one.

    Args:
        model: the whole model; every further set is injected into the same one.
        config: settings of the set.
        condition_dim: number of degradation scores D; 0 for a plain LoRA.
        name: of the set.
        score_names: what the scores are called.
        router: makes the router from (config, layers L, scores D).
        layers, saved: names of the layers and of the modules to save, as a file holds them; by default those that the
            config's patterns match.

    Raises:
        ConfigError: a pattern without a match, a layer that cannot be adapted, a name that is taken, or scores that are
            missing. Nothing has changed then.
    """
    modules = {module_name: original(module) for module_name, module in modules_of(model)}
    if layers is None:
        weighted = [one for one, module in modules.items() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
        layers = _matching(config.targets, weighted, "targets: {!r} matches no Linear or convolution")
    if saved is None:
        saved = _matching(config.modules_to_save, list(modules), "modules_to_save: {!r} matches no module")
        # a module inside another is part of that one
        saved = [one for one in saved if not one.startswith(tuple(f"{other}." for other in saved))]
    if missing := [one for one in [*layers, *saved] if one not in modules]:
        raise ConfigError(f"the model has no layer {missing[0]!r} ({len(missing)} missing)")
    _check_adaptable(model, {layer: modules[layer] for layer in layers})
    switch = switch_of(model)
    if any(layer.switch is not switch for _, layer in adapted_layers(model)):
        raise ConfigError("parts of this model were adapted by themselves; inject every set into the whole model")
    if switch is not None and name in switch.reports:
        raise ConfigError(f"the model has an adapter set {name!r} already; choose another name")
    if not name or "." in name:
        raise ConfigError(f"name: expected a set's name without dots, got {name!r}")
    if config.num_slots and condition_dim < 1:
        raise ConfigError(f"condition_dim: expected the number of degradation scores, got {condition_dim}")
    inside = tuple(f"{one}." for one in saved if one not in layers)
    if held := [layer for layer in layers if layer.startswith(inside)]:
        raise ConfigError(f"modules_to_save: {held[0]} is a target too, inside a module that is trained whole")
    made = router(config, len(layers), condition_dim).to(modules[layers[0]].weight.device).train(model.training)

    if switch is None:
        model.requires_grad_(False)
        switch = Switch(active=name)
    adapted = [_wrapped(model, layer, switch) for layer in layers]
    for index, layer in enumerate(adapted):
        layer.sets[name] = Ranks(layer.base_layer, config, index)
    adapted[0].routers[name] = made  # a place in the module tree: it moves and is saved with the model
    taken = set(layers)
    skipped = tuple(other for other, module in modules.items() if _kind(module) and other not in taken)
    report = InjectionReport(
        switch, name, config, made, adapted, tuple(layers), skipped, score_names=tuple(score_names)
    )
    add_saved_modules(model, report, saved)
    return report


def add_saved_modules(model: nn.Module, report: InjectionReport, modules: Sequence[str]) -> None:
    """Give modules, by their names, a copy that is trained whole and runs while the set is active."""
    for name in modules:
        if name not in report.copies:
            wrapper = _wrapped(model, name, report.switch)
            # other sets' ranks inside stay with the original
            bare = {id(layer): copy.deepcopy(layer.base_layer) for _, layer in adapted_layers(wrapper.base_layer)}
            report.copies[name] = copy.deepcopy(wrapper.base_layer, bare).requires_grad_(True)
            wrapper.copies[report.name] = report.copies[name]


def _wrapped(model: nn.Module, name: str, switch: Switch) -> AdaptedLayer:
    """The wrapper of a module, which is made for the first set that wants it."""
    module = model.get_submodule(name)
    if isinstance(module, AdaptedLayer):
        return module
    parent, _, key = name.rpartition(".")
    wrapper = AdaptedLayer(module, switch)
    original(model.get_submodule(parent))._modules[key] = wrapper
    return wrapper


def _matching(targets: Sequence[str], names: Sequence[str], problem: str) -> list[str]:
    """The names that targets match, in the model's order; a target that matches none is a problem."""
    found = {target: matching(target, names) for target in targets}
    if idle := [target for target, hits in found.items() if not hits]:
        raise ConfigError(f"{problem.format(idle[0])}; see named_modules()")
    return [name for name in names if any(name in hits for hits in found.values())]


def _kind(base: nn.Module) -> type[nn.Module] | None:
    """nn.Linear or nn.Conv2d for these very classes, and for a subclass that says it computes like one; else None."""
    kind = getattr(base, "computes_like", type(base))
    return kind if kind in (nn.Linear, nn.Conv2d) else None


def _check_adaptable(model: nn.Module, chosen: dict[str, Any]) -> None:
    encoders = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    past = tuple(f"{name}.".lstrip(".") for name in encoders)
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    for name, base in chosen.items():
        if _kind(base) is None:
            got = type(base).__name__
            raise ConfigError(f"{name}: expected torch's Linear or Conv2d, got {got}; leave it out")
        if past and name.startswith(past):
            raise ConfigError(f"{name}: torch's TransformerEncoderLayer reads its weights past the ranks; leave it out")
        if isinstance(base, nn.Conv2d) and (base.groups > 1 or base.padding_mode != "zeros"):
            raise ConfigError(f"{name}: convolutions with groups or padding other than zeros cannot be adapted")
        # The update of a layer that is registered twice, or shares its weight, would reach one place of two.
        names = owners.get(id(base.weight), [])
        if not names:
            raise ConfigError(f"{name}: its weight is computed from others and cannot be adapted; leave it out")
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names)} are one weight and cannot be adapted; leave them out")


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Adapted layers of a model or of a part of one, with their names in it without wrappers."""
    return [(name, module) for name, module in modules_of(model) if isinstance(module, AdaptedLayer)]


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of an adapted model or part of one; None where no layer is adapted."""
    return next((module.switch for _, module in modules_of(model) if isinstance(module, AdaptedLayer)), None)


def report_of(model: nn.Module, name: str = "generator") -> InjectionReport:
    """The set of a name on a model, as `inject` returned it.

    Raises:
        ConfigError: the model has no such set.
    """
    switch = switch_of(model)
    if switch is None or name not in switch.reports:
        names = ", ".join(switch.reports) if switch else "none"
        raise ConfigError(f"the model has no adapter set {name!r}; it has {names}")
    return switch.reports[name]


def layers_of_set(model: nn.Module, name: str) -> list[tuple[str, AdaptedLayer, Ranks]]:
    """Layers of a model, or of a part of it, that carry a set, in the order of its routing, with their ranks.

    They are named as seen from the model that is given.
    """
    names = {layer: path for path, layer in adapted_layers(model)}
    layers = report_of(model, name).layers
    return [(names[layer], layer, layer.sets[name]) for layer in layers if layer in names]


@contextmanager
def active_adapters(model: nn.Module, name: str | None) -> Iterator[None]:
    """Activate one adapter set, or by None the base alone, in all layers of a model inside a ``with`` block.

    Raises:
        ConfigError: the model has no such set.
    """
    switch = report_of(model, name).switch if name is not None else switch_of(model)
    with switch.set(name) if switch is not None else nullcontext():
        yield


def adapter_parameters(model: nn.Module, name: str = "generator") -> list[nn.Parameter]:
    """Everything a set trains: the ranks of its layers, its router, its modules_to_save."""
    report = report_of(model, name)
    modules = [*(layer.sets[name] for layer in report.layers), report.router, *report.copies.values()]
    return [parameter for module in modules for parameter in module.parameters()]


def plain_state_dict(model: nn.Module, *, name: str | None = None) -> dict[str, Tensor]:
    """State of the bare model under its own names; while `merged` is open, its layers' weights are the merged ones.

    The modules_to_save of the set `name` replace the originals.
    """
    state: dict[str, Tensor] = {}

    def add(module: nn.Module, prefix: str) -> None:
        module = module.torch_layer(name) if isinstance(module, AdaptedLayer) else module
        module._save_to_state_dict(state, prefix, keep_vars=False)
        for key, child in module._modules.items():
            if child is not None:
                add(child, f"{prefix}{key}.")

    add(model, "")
    return state
