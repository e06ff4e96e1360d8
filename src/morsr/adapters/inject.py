"""Put adapter sets on a model, find them there, and switch between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.layer import AdaptedLayer, Ranks, SavedModule, Switch
from morsr.adapters.report import InjectionReport
from morsr.adapters.router import Router
from morsr.adapters.targets import expand_targets, matches
from morsr.errors import ConfigError

RouterFactory = Callable[[MoRConfig, int, int], Router]


class Place(NamedTuple):
    """A module under its name in the bare model, and where it hangs."""

    name: str
    module: nn.Module
    parent: nn.Module
    key: str

    @property
    def original(self) -> Any:
        """The base's own module behind the wrappers."""
        inner = self.module
        while isinstance(inner, (AdaptedLayer, SavedModule)):
            inner = inner.base_layer
        return inner


def module_places(module: nn.Module, prefix: str = "") -> Iterator[Place]:
    """All modules under their names in the bare model; a module that is registered twice comes twice."""
    inner = module.base_layer if isinstance(module, SavedModule) else module
    for key, child in inner._modules.items():
        if child is None:
            continue
        yield Place(prefix + key, child, inner, key)
        if not isinstance(child, AdaptedLayer):
            yield from module_places(child, f"{prefix}{key}.")


def inject(
    model: nn.Module,
    config: MoRConfig,
    *,
    condition_dim: int = 0,
    name: str = "generator",
    score_names: Sequence[str] = (),
    router: RouterFactory = Router,
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

    Raises:
        ConfigError: a pattern without a match, a layer that cannot be adapted, a name that is taken, or scores that are
            missing. Nothing has changed then.

    >>> from torch import nn, rand
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    >>> config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=["0", "2"])
    >>> report = inject(net, config, condition_dim=3)
    >>> routing = report.route(rand(5, 3))
    >>> net(rand(5, 4)).shape
    torch.Size([5, 4])
    """
    places = list(module_places(model))
    layers = _matching(places, config.targets, "targets", (nn.Linear, nn.modules.conv._ConvNd))
    saved = _matching(places, config.modules_to_save, "modules_to_save", (nn.Module,))
    # a module inside another is part of that one
    saved = [one for one in saved if not one.startswith(tuple(f"{other}." for other in saved))]
    return inject_by_name(
        model, config, layers, saved, condition_dim=condition_dim, name=name, score_names=score_names, router=router
    )


def inject_by_name(
    model: nn.Module,
    config: MoRConfig,
    layers: Sequence[str],
    saved: Sequence[str],
    *,
    condition_dim: int,
    name: str,
    score_names: Sequence[str],
    router: RouterFactory = Router,
) -> InjectionReport:
    """As `inject`, for layers and modules by their names, in that order: what a file says rather than its patterns."""
    places = {place.name: place for place in module_places(model)}
    if missing := [one for one in [*layers, *saved] if one not in places]:
        raise ConfigError(f"the model has no layer {missing[0]!r} ({len(missing)} missing)")
    chosen = [places[layer] for layer in layers]
    for place in chosen:
        _check_adaptable(place)
    _check_shared(model, chosen)
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
    made = router(config, len(chosen), condition_dim).to(chosen[0].original.weight.device).train(model.training)

    if switch is None:
        model.requires_grad_(False)
        switch = Switch(active=name)
    adapted: list[AdaptedLayer] = []
    for index, place in enumerate(chosen):
        layer = place.module if isinstance(place.module, AdaptedLayer) else AdaptedLayer(place.module, switch)
        place.parent._modules[place.key] = layer
        layer.sets[name] = Ranks(place.original, config, index)
        adapted.append(layer)
    adapted[0].routers[name] = made  # a place in the module tree: it moves and is saved with the model
    taken = set(layers)
    skipped = tuple(place.name for place in places.values() if _kind(place.original) and place.name not in taken)
    report = InjectionReport(
        switch, name, config, made, adapted, tuple(layers), skipped, score_names=tuple(score_names)
    )
    add_saved_modules(model, report, saved)
    return report


def add_saved_modules(model: nn.Module, report: InjectionReport, modules: Sequence[str]) -> None:
    """Give modules, by their names, a copy that is trained whole and runs while the set is active."""
    places = {place.name: place for place in module_places(model)}
    for name in modules:
        if name in report.copies:
            continue
        place = places[name]
        adapted = isinstance(place.module, AdaptedLayer)
        parent, key = (place.module, "base_layer") if adapted else (place.parent, place.key)
        inner: Any = parent._modules[key]
        wrapper = inner if isinstance(inner, SavedModule) else SavedModule(inner, report.switch)
        wrapper.copies[report.name] = copy.deepcopy(wrapper.base_layer).requires_grad_(True)
        report.copies[name] = wrapper.copies[report.name]
        parent._modules[key] = wrapper


def _matching(
    places: Sequence[Place], patterns: Sequence[str], setting: str, kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of the modules of some kinds that patterns name, in the model's order; every pattern must name one."""
    found: set[str] = set()
    fitting = [place.name for place in places if isinstance(place.original, kinds)]
    for target, compiled in expand_targets(patterns):
        hits = [name for name in fitting if any(matches(pattern, name) for pattern in compiled)]
        if not hits:
            wanted = " or ".join(kind.__name__.strip("_") for kind in kinds)
            raise ConfigError(f"{setting}: {target!r} matches no {wanted}; see named_modules()")
        found.update(hits)
    return [name for name in fitting if name in found]


def _kind(base: nn.Module) -> type[nn.Module] | None:
    """nn.Linear or nn.Conv2d for these very classes, and for a subclass that says it computes like one; else None."""
    kind = getattr(base, "computes_like", type(base))
    return kind if kind in (nn.Linear, nn.Conv2d) else None


def _check_adaptable(place: Place) -> None:
    base = place.original
    if _kind(base) is None:
        raise ConfigError(f"{place.name}: expected torch's Linear or Conv2d, got {type(base).__name__}; leave it out")
    if isinstance(base, nn.Conv2d) and (base.groups > 1 or base.padding_mode != "zeros"):
        raise ConfigError(f"{place.name}: convolutions with groups or padding other than zeros cannot be adapted")


def _check_shared(model: nn.Module, chosen: Sequence[Place]) -> None:
    """Refuse layers that are registered twice or share their weight: the update would reach one place of two."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for place in chosen:
        if len(names := owners[id(place.original.weight)]) > 1:
            raise ConfigError(f"{' and '.join(names)} are one weight and cannot be adapted; leave them out")


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Adapted layers of a model or of a part of one, with their names in it without wrappers."""
    return [(place.name, place.module) for place in module_places(model) if isinstance(place.module, AdaptedLayer)]


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of an adapted model or part of one; None where no layer is adapted."""
    return next((layer.switch for _, layer in adapted_layers(model)), None)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapter sets on a model."""
    switch = switch_of(model)
    return tuple(switch.reports) if switch else ()


def report_of(model: nn.Module, name: str = "generator") -> InjectionReport:
    """The set of a name on a model, as `inject` returned it.

    Raises:
        ConfigError: the model has no such set.
    """
    switch = switch_of(model)
    if switch is None or name not in switch.reports:
        raise ConfigError(f"the model has no adapter set {name!r}; it has {', '.join(adapter_names(model)) or 'none'}")
    return switch.reports[name]


def layers_of_set(model: nn.Module, name: str) -> list[tuple[str, AdaptedLayer, Ranks]]:
    """Layers of a model, or of a part of it, that carry a set, in the order of its routing, with their ranks.

    They are named as seen from the model that is given.
    """
    names = {layer: path for path, layer in adapted_layers(model)}
    layers = report_of(model, name).layers
    return [(names[layer], layer, layer.ranks(name)) for layer in layers if layer in names]


@contextmanager
def active_adapters(model: nn.Module, name: str | None) -> Iterator[None]:
    """Activate one adapter set, or by None the base alone, in all layers of a model inside a ``with`` block.

    Raises:
        ConfigError: the model has no such set.
    """
    switch = report_of(model, name).switch if name is not None else switch_of(model)
    if switch is None:
        yield
        return
    with switch.set(name):
        yield


def adapter_parameters(model: nn.Module, name: str = "generator") -> list[nn.Parameter]:
    """Everything a set trains: the ranks of its layers, its router, its modules_to_save."""
    return [parameter for group in adapter_parameter_groups(model, name) for parameter in group["params"]]


def adapter_parameter_groups(
    model: nn.Module,
    name: str = "generator",
    lr: float = 5e-5,
    router_lr_scale: float = 20.0,
    saved_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of a set: its ranks at ``lr``, its router and its modules_to_save at scaled rates.

    The router's gradient comes through the small gates of a few slots, so it needs a higher rate.
    """
    report = report_of(model, name)
    ranks = [p for layer in report.layers for p in layer.ranks(name).parameters()]
    saved = [p for module in report.copies.values() for p in module.parameters()]
    groups = [
        {"params": ranks, "lr": lr, "name": "ranks"},
        {"params": list(report.router.parameters()), "lr": lr * router_lr_scale, "name": "router"},
        # weights that were pretrained without ranks have no reason to shrink
        {"params": saved, "lr": lr * saved_lr_scale, "name": "saved", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def plain_state_dict(model: nn.Module, *, name: str | None = None) -> dict[str, Tensor]:
    """State of the bare model under its own names; while `merged` is open, its layers' weights are the merged ones.

    The modules_to_save of the set `name` replace the originals.
    """
    state: dict[str, Tensor] = {}

    def add(module: nn.Module, prefix: str) -> None:
        if isinstance(module, AdaptedLayer):
            add(module.base_layer, prefix)
        elif isinstance(module, SavedModule):
            add(module.of(name), prefix)
        else:
            module._save_to_state_dict(state, prefix, keep_vars=False)
            for key, child in module._modules.items():
                if child is not None:
                    add(child, f"{prefix}{key}.")

    add(model, "")
    return state
