"""Put adapter sets on a model, choose which one works, and list what they train."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from morsr.adapters.config import MoRConfig
from morsr.adapters.layer import AdaptedLayer, RankSet, can_adapt
from morsr.adapters.router import RoutingContext
from morsr.adapters.state import SharedState
from morsr.adapters.suitable import check_suitable
from morsr.adapters.targets import expand_targets, matches
from morsr.errors import ConfigError


@dataclass(frozen=True)
class AdaptedEntry:
    """One adapted layer: its name, kind of layer, shape of its weight, stored ranks and adapter parameters."""

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: int
    parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What inject did.

    Attributes:
        context: router and routing of the new set.
        matched: the adapted layers, in the order of the routing's layers.
        skipped: names of the Linear and Conv2d layers that no target matched.
    """

    context: RoutingContext
    matched: tuple[AdaptedEntry, ...]
    skipped: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Trained parameters: ranks and router."""
        return sum(entry.parameters for entry in self.matched) + sum(p.numel() for p in self.context.parameters())

    def table(self) -> str:
        """The adapted layers as a text table."""
        rows = [("layer", "kind", "shape", "ranks", "parameters")]
        rows += [(e.name, e.kind, "×".join(map(str, e.shape)), str(e.ranks), f"{e.parameters:,}") for e in self.matched]
        rows.append(("router", "", "", "", f"{sum(p.numel() for p in self.context.parameters()):,}"))
        rows.append(
            (f"total ({len(self.matched)} layers, {len(self.skipped)} skipped)", "", "", "", f"{self.parameters:,}")
        )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for row in rows:
            texts = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
            numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=False)]
            lines.append("  ".join(texts + numbers).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class _Candidate:
    module: nn.Linear | nn.Conv2d | AdaptedLayer
    names: tuple[str, ...]  # more than one where a model registers a layer twice
    parents: tuple[tuple[nn.Module, str], ...]

    @property
    def base(self) -> nn.Linear | nn.Conv2d:
        return self.module.base_layer if isinstance(self.module, AdaptedLayer) else self.module


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Names and adapted layers of a model, in its own order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State of the bare model under its own names: without adapters, and as merged while a merge is open."""
    named = model.named_modules(remove_duplicate=False)
    adapted = {name for name, module in named if isinstance(module, AdaptedLayer)}
    added = tuple(f"{name}.{part}." for name in adapted for part in ("sets", "contexts"))
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        layer, wrapped, parameter = key.rpartition(".base_layer.")
        if wrapped and layer in adapted:
            state[f"{layer}.{parameter}"] = value
        elif not key.startswith(added):
            state[key] = value
    return state


def layers_of_set(model: nn.Module, name: str) -> list[tuple[str, AdaptedLayer, RankSet]]:
    """Layers that carry a set, in the order of its routing.

    Raises:
        ConfigError: the model has no such set.
    """
    found = [(path, layer, layer.sets[name]) for path, layer in adapted_layers(model) if name in layer.sets]
    if not found:
        known = ", ".join(map(repr, adapter_names(model))) or "none; call inject or load_adapters first"
        raise ConfigError(f"the model has no adapter set {name!r}; it has {known}")
    return sorted(found, key=lambda item: item[2].index)  # type: ignore[arg-type,return-value,union-attr]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapter sets on a model."""
    return tuple(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.sets))


def routing_context(model: nn.Module, name: str = "generator") -> RoutingContext:
    """Routing context of a set on a model."""
    return layers_of_set(model, name)[0][1].shared.contexts[name]


def shared_state(model: nn.Module) -> SharedState:
    """State of a model's adapted layers.

    Raises:
        ConfigError: the model has no adapters, or parts that were adapted apart and never together.
    """
    states = {id(layer.shared): layer.shared for _, layer in adapted_layers(model)}
    if len(states) != 1:
        what = "no adapters" if not states else "parts that were adapted separately; go through one part"
        raise ConfigError(f"the model has {what}")
    return next(iter(states.values()))


def _candidates(model: nn.Module) -> list[_Candidate]:
    found: dict[int, tuple[Any, list[str], list[tuple[nn.Module, str]]]] = {}

    def walk(parent: nn.Module, prefix: str, above: tuple[nn.Module, ...]) -> None:
        for key, child in parent._modules.items():
            if child is None or child in above:  # a child may hold its parent
                continue
            if isinstance(child, AdaptedLayer) or can_adapt(child):
                _, names, parents = found.setdefault(id(child), (child, [], []))
                names.append(prefix + key)
                parents.append((parent, key))
            else:
                walk(child, f"{prefix}{key}.", (*above, child))

    walk(model, "", (model,))
    return [_Candidate(module, tuple(names), tuple(parents)) for module, names, parents in found.values()]


@dataclass(frozen=True)
class InjectionPlan:
    """Layers that an injection would adapt, found and checked without touching the model."""

    matched: tuple[tuple[str, _Candidate], ...]
    skipped: tuple[str, ...]


def plan_injection(model: nn.Module, config: MoRConfig, name: str) -> InjectionPlan:
    """Find and check what inject would adapt; the model stays as it is.

    Raises:
        ConfigError: as ``inject``.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"name of an adapter set: expected letters, digits and underscores, got {name!r}")
    if can_adapt(model) or isinstance(model, AdaptedLayer):
        raise ConfigError(f"inject replaces layers inside a model; got a bare {type(model).__name__}: put it into one")
    if name in adapter_names(model):
        raise ConfigError(f"the model has an adapter set {name!r} already; choose another name")
    candidates = _candidates(model)
    matched: set[int] = set()
    for target, patterns in expand_targets(config.targets):
        hits = [c for c in candidates if any(matches(pattern, key) for pattern in patterns for key in c.names)]
        if not hits:
            children = ", ".join(key for key, _ in model.named_children()) or "no children"
            raise ConfigError(
                f"target {target!r} matches none of the {len(candidates)} Linear and Conv2d layers of "
                f"{type(model).__name__} (children: {children}); a preset finds an inner network as 'preset@child'"
            )
        matched |= {id(c.module) for c in hits}
    # A layer that a model registers twice goes by its first name, as in named_modules.
    chosen = [(c.names[0], c) for c in candidates if id(c.module) in matched]
    if (lazy := next((key for key, parameter in model.named_parameters() if is_lazy(parameter)), None)) is not None:
        raise ConfigError(f"{lazy} of this lazy model is not there yet; run the model once before inject")
    for layer_name, candidate in chosen:
        check_suitable(layer_name, candidate.base, candidate.parents)
    _check_parts([c.module.shared for c in candidates if isinstance(c.module, AdaptedLayer)], name)
    skipped = tuple(c.names[0] for c in candidates if id(c.module) not in matched)
    return InjectionPlan(tuple(chosen), skipped)


def _check_parts(states: Sequence[SharedState], name: str) -> None:
    """Check that parts of a model, adapted apart or together, can have one more set and one state from now on."""
    parts = list({id(state): state for state in states}.values())
    for state in parts:
        if name in state.contexts:
            raise ConfigError(f"adapter set {name!r} exists on another part of this model already; choose another name")
        if state.now.is_merged:
            raise ConfigError("the model is merged; leave merged(...) before injecting")
    names = [key for state in parts for key in state.contexts]
    if (twice := next((key for key in names if names.count(key) > 1), None)) is not None:
        raise ConfigError(
            f"parts of this model were adapted apart, and two of them have a set {twice!r}; a model has one set of a "
            "name. Inject each with a name of its own, or one set on the whole model, whose targets reach both parts"
        )
    active = [state.now.active for state in parts if state.now.active is not None]
    if len(active) > 1:
        raise ConfigError(
            f"parts of this model were adapted apart, and a set works in each: {', '.join(map(repr, active))}; a model "
            "has one that works. Inject one set on the whole model from the start, whose targets reach all parts"
        )


def inject(
    model: nn.Module,
    config: MoRConfig,
    *,
    condition_dim: int | None = None,
    name: str = "generator",
    condition_names: Sequence[str] = (),
) -> InjectionReport:
    """Put an adapter set on the layers of a model that the config targets, and freeze the model.

    The fresh set changes no output: its update is zero. The first set that a model gets is the active one.

    Args:
        model: any module; its Linear and Conv2d layers are replaced in place by wrappers that share their weights.
        config: settings of the set.
        condition_dim: number of degradation scores D; a plain LoRA needs none and leaves it out of account.
        name: of the set; several sets may live on one model.
        condition_names: what the scores are called; saved with the set.

    Raises:
        ConfigError: a target that matches nothing, a name in use, a missing condition_dim, a layer that cannot be
            adapted, or parts that were adapted apart and cannot go together. Nothing has changed then.
    """
    plan = plan_injection(model, config, name)
    if config.is_routed and (not isinstance(condition_dim, int) or condition_dim < 1):
        raise ConfigError(
            f"condition_dim: expected the number of degradation scores (at least 1), got {condition_dim!r}"
        )
    width = condition_dim if config.is_routed and condition_dim else 0
    if condition_names and len(condition_names) != width:
        raise ConfigError(f"condition_names: expected {width} names, got {list(condition_names)}")
    shared = _join_states([c.module.shared for c in _candidates(model) if isinstance(c.module, AdaptedLayer)])
    for parameter in _base_parameters(model):
        parameter.requires_grad_(False)
    layers = []
    for index, (_, candidate) in enumerate(plan.matched):
        layer = candidate.module
        if not isinstance(layer, AdaptedLayer):
            layer = AdaptedLayer(candidate.base, shared)
            for parent, key in candidate.parents:
                parent._modules[key] = layer
        ranks = RankSet(layer.base_layer, config, index)  # type: ignore[arg-type]
        ranks.train(layer.training)
        layer.sets[name] = ranks
        layers.append(layer)
    context = RoutingContext(
        config,
        [layer_name for layer_name, _ in plan.matched],
        width,
        name=name,
        condition_names=condition_names,
        device=layers[0].base_layer.weight.device,
    )
    context.train(model.training)
    layers[0].contexts[name] = context
    context.attach(shared)
    if shared.now.active is None and len(shared.contexts) == 1:
        shared.change(active=name)
    return report_of(model, name)


def report_of(model: nn.Module, name: str = "generator") -> InjectionReport:
    """Report of a set that is on a model, as inject returned it."""
    context = routing_context(model, name)
    entries = []
    for _, layer, ranks in layers_of_set(model, name):
        shape = tuple(layer.base_layer.weight.shape)  # type: ignore[union-attr]
        kind = "Linear" if len(shape) == 2 else f"Conv2d {shape[2]}×{shape[3]}"
        parameters = ranks.down.numel() + ranks.up.numel()
        entries.append(AdaptedEntry(context.layer_names[ranks.index], kind, shape, ranks.down.shape[0], parameters))
    skipped = tuple(
        c.names[0] for c in _candidates(model) if not (isinstance(c.module, AdaptedLayer) and name in c.module.sets)
    )
    return InjectionReport(context, tuple(entries), skipped)


def _join_states(states: Sequence[SharedState]) -> SharedState:
    """One state for all layers: parts that were adapted apart share the first part's from now on."""
    distinct = list({id(state): state for state in states}.values())
    first = distinct[0] if distinct else SharedState()
    for other in distinct[1:]:
        for layer in other.layers:
            layer.shared = first
        first.layers += other.layers
        for context in other.contexts.values():
            context.attach(first)
        if first.now.active is None:
            first.change(active=other.now.active)
    return first


def _base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    adapters = {id(p) for _, layer in adapted_layers(model) for p in layer.sets.parameters()}
    adapters |= {id(p) for _, layer in adapted_layers(model) for p in layer.contexts.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in adapters)


@contextmanager
def active_adapters(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let one adapter set work, or none, inside a ``with`` block; nothing is copied.

    Args:
        model: an adapted model or an adapted part of one; the choice counts for all layers adapted together with it.
        name: of a set, or None for the base alone.

    Raises:
        ConfigError: the model has no such set, or its weights are merged just now.
    """
    if name is not None:
        layers_of_set(model, name)
    elif not adapter_names(model):
        yield
        return
    shared = shared_state(model)
    before = shared.now.active
    if shared.now.is_merged and name != before:
        raise ConfigError(f"set {before!r} is merged into the weights; leave merged(...) before another set works")
    shared.change(active=name)
    try:
        yield
    finally:
        shared.change(active=before)


def adapter_parameters(model: nn.Module, name: str = "generator") -> list[nn.Parameter]:
    """Everything a set trains: the ranks of its layers, then its router."""
    ranks = [parameter for _, _, ranks in layers_of_set(model, name) for parameter in ranks.parameters()]
    return ranks + list(routing_context(model, name).parameters())


def adapter_parameter_groups(
    model: nn.Module, name: str = "generator", lr: float = 5e-5, router_lr_scale: float = 20.0
) -> list[dict[str, Any]]:
    """Optimizer groups of a set: its ranks at ``lr``, its router at ``lr * router_lr_scale``.

    The router's gradient comes through the small gates of a few slots, so it learns at a rate of its own.
    """
    groups = [{"params": [p for _, _, ranks in layers_of_set(model, name) for p in ranks.parameters()], "lr": lr}]
    router = list(routing_context(model, name).parameters())
    if router:
        groups.append({"params": router, "lr": lr * router_lr_scale})
    return [{**group, "name": label} for group, label in zip(groups, ("ranks", "router"), strict=False)]


def checkpoint_function(model: nn.Module) -> Callable[..., Any]:
    """Activation checkpointing that also restores routing and active set for compiled blocks.

    Eager layers look up by themselves what held when they ran first, whatever checkpoint function is used. A compiled
    block cannot look, so its checkpoint function has to put the state back around the recomputation; diffusers takes
    this one as ``unet.enable_gradient_checkpointing(checkpoint_function(model))``.
    """
    shared = shared_state(model)

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        then = shared.now
        contexts = lambda: (nullcontext(), shared.restored(then))  # noqa: E731
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
