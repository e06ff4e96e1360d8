"""Fold the ranks of one routing into the weights, for as long as a ``with`` block lasts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters.inject import adapter_names, layers_of_set, shared_state
from morsr.adapters.layer import AdaptedLayer, RankSet
from morsr.adapters.state import LayerGates, SharedState
from morsr.errors import ConfigError, InputError

# Forward passes of the whole network with one routing from which a merge is repaid: 7.4 on SD 2.1 at 64x64 latents
# (benchmarks/RESULTS.md).
MERGE_PAYS_FROM = 8

MERGED = "+merged:"
"""Stands, before a hash, in the id of a base whose weights hold adapters already."""


@dataclass
class Merge:
    """An open merge.

    Attributes:
        name: set that is merged.
        backup_bytes: memory of the one backup it holds: the adapted layers' own weights.
        merges: how often the weights were written; it stays at 1 while the routing stays the same.
        ranks_run: ranks folded in, summed over layers; chosen zero experts add none.
        ranks_most: what it would be without zero experts.
    """

    name: str
    backup_bytes: int = 0
    merges: int = 0
    ranks_run: int = 0
    ranks_most: int = 0


class _Merger:
    def __init__(self, layers: list[tuple[str, AdaptedLayer, RankSet]], shared: SharedState, name: str) -> None:
        self.layers, self.shared = layers, shared
        self.originals = [layer.base_layer.weight.data for _, layer, _ in layers]  # type: ignore[union-attr]
        self.key: list[Tensor] | None = None
        self.merge = Merge(name, sum(weight.nbytes for weight in self.originals))  # type: ignore[misc]

    @torch.no_grad()
    def write(self) -> None:
        """Merge the present gates, unless the weights hold just these."""
        gates = self.shared.now.gates[self.merge.name]
        if gates is None:
            raise InputError(f"adapter set {self.merge.name!r} has no routing to merge: set context.condition first")
        key, live = self._summary(gates)
        if self.key is not None and len(key) == len(self.key) and all(map(torch.equal, key, self.key)):
            return
        run = 0
        for (_, layer, ranks), original, row, kept in zip(self.layers, self.originals, gates, live, strict=True):
            present: Tensor = layer.base_layer.weight.data  # type: ignore[union-attr,assignment]
            # A new storage at first, then the same one again: the original stays untouched and comes back bit for bit.
            out = None if present.data_ptr() == original.data_ptr() else present  # type: ignore[operator]
            merged = ranks.add_to_weight(original, row, live=kept, out=out)
            if out is None:
                layer.base_layer.weight.data = merged  # type: ignore[union-attr]
            run += ranks.down.shape[0] if kept is None else len(kept)
        self.key = key
        self.merge.merges += 1
        self.merge.ranks_run = run
        self.merge.ranks_most = sum(
            r.down.shape[0] if g.ranks is None else g.ranks.shape[1]
            for g, (_, _, r) in zip(gates, self.layers, strict=True)
        )

    def follow(self) -> None:
        """Write again after a change; without a routing, or with one that cannot be merged, layers refuse to run."""
        if self.shared.now.gates[self.merge.name] is None:
            return
        try:
            self.write()
        except InputError:
            self.shared.set_gates(self.merge.name, None)
            raise

    def _summary(self, gates: tuple[LayerGates, ...]) -> tuple[list[Tensor], list[list[int] | None]]:
        """What identifies these gates, and per layer the positions of ranks that work; one transfer for all layers."""
        factors = [row.factors for row in gates]
        if factors[0] is None:
            return [], [None] * len(gates)
        stacked = torch.stack(factors)  # type: ignore[arg-type]
        if stacked.shape[1] != 1:
            raise InputError(
                f"a merge holds the ranks of one image, the routing is for {stacked.shape[1]}; "
                "set a routing of one image, as context.routing.image(0)"
            )
        key = [stacked.clone()]
        if gates[0].ranks is None:
            return key, [None] * len(gates)
        key.append(torch.stack([row.ranks for row in gates]))  # type: ignore[misc]
        works = (stacked[:, 0] != 0).tolist()
        return key, [[place for place, on in enumerate(row) if on] for row in works]

    def restore(self) -> None:
        for (_, layer, _), original in zip(self.layers, self.originals, strict=True):
            layer.base_layer.weight.data = original  # type: ignore[union-attr,assignment]


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Iterator[Merge]:
    """Fold the ranks of the present routing into the weights; the layers then cost what the bare model costs.

    Updates are added in float32 and rounded once to the weights' dtype. The block may set another condition, routing or
    knob: the weights follow, and are left alone where nothing changed. On exit the original weights are back bit for
    bit. While open it holds one more copy of the adapted layers' weights (``backup_bytes``).

    Args:
        model: an adapted model in evaluation mode.
        name: a set; the active one by default.

    Raises:
        ConfigError: no set is active, another merge is open, the set is in training mode, or an adapted layer's weight
            is another module's too, is computed from other parameters, or is changed by the layer before use.
        InputError: no condition is set, or the routing is for more than one image.
    """
    shared = shared_state(model)
    name = name or shared.now.active
    if name is None:
        raise ConfigError("no adapter set is active; say which one to merge")
    layers_of_set(model, name)
    context = shared.contexts[name]
    if shared.now.is_merged:
        raise ConfigError("the model is merged already; leave that block first")
    if context.training:
        raise ConfigError("merged weights pass no gradient to the ranks; call model.eval() first")
    if (obstacle := _obstacle(model, shared, name)) is not None:
        raise ConfigError(f"{obstacle}; do not merge")
    merger = _Merger(_layers(shared, name), shared, name)
    active = shared.now.active
    try:
        merger.write()
        context.on_change = merger.follow
        shared.change(active=name, is_merged=True)
        yield merger.merge
    finally:
        context.on_change = None
        shared.change(active=active, is_merged=False)
        merger.restore()


def merged_mark(model: nn.Module) -> str:
    """What the id of a base gains when its weights are stored while a merge is open; "" where none is.

    Without it, the same adapters would be taken by the stored base and count twice.
    """
    shared = shared_state(model) if adapter_names(model) else None
    name = shared.now.active if shared is not None and shared.now.is_merged else None
    if shared is None or name is None:
        return ""
    context = shared.contexts[name]
    digest = hashlib.sha256(str(context.config.scale).encode())
    tensors: list[Tensor] = [value for _, _, ranks in _layers(shared, name) for value in (ranks.down, ranks.up)]
    if (routing := context.effective_routing) is not None:
        tensors.append(routing.gates.round(decimals=4))  # other devices round otherwise
    for value in tensors:
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return MERGED + digest.hexdigest()[:8]


def _layers(shared: SharedState, name: str) -> list[tuple[str, AdaptedLayer, RankSet]]:
    """All layers of a set, in other parts of the model too, with their names in it, in the order of its routing."""
    sets: list[tuple[AdaptedLayer, Any]] = [(layer, layer.sets[name]) for layer in shared.layers if name in layer.sets]
    found = [(shared.contexts[name].layer_names[ranks.index], layer, ranks) for layer, ranks in sets]
    return sorted(found, key=lambda item: item[2].index)


def _obstacle(model: nn.Module, shared: SharedState, name: str) -> str | None:
    """Why the ranks of a set cannot be in the weights of its layers; None if they can."""
    layers = _layers(shared, name)
    for path, layer, _ in layers:
        if not layer.can_merge():
            return (
                f"{path}: {type(layer.base_layer).__name__} computes or changes its weight before use, so that ranks "
                "in it would not have the effect that they have beside it"
            )
    if (tied := _tied(model, [layer for _, layer, _ in layers])) is not None:
        return f"{' and '.join(tied)} share one weight, which cannot hold the ranks of one of them"
    return None


def _tied(model: nn.Module, layers: list[AdaptedLayer]) -> list[str] | None:
    """Names of modules that hold the same weight as an adapted layer, with that layer's; None where there are none."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path.removesuffix(".base_layer"))
    found = (owners.get(id(layer.base_layer.weight), []) for layer in layers)
    return next((names for names in found if len(names) > 1), None)


@contextmanager
def auto_merged(model: nn.Module, passes: int, name: str | None = None) -> Iterator[Merge | None]:
    """Merge if so many passes with one routing repay it, else leave the layers to gather their ranks.

    Where no set works, and where weights cannot hold the ranks (`merged` says why), nothing is merged either.

    Args:
        model: a model in evaluation mode.
        passes: forward passes of the network that will share the routing (tiles, frames).
        name: a set; the active one by default.
    """
    shared = shared_state(model) if name is not None or adapter_names(model) else None
    name = name or (shared.now.active if shared is not None else None)
    if passes < MERGE_PAYS_FROM or shared is None or name is None or _obstacle(model, shared, name) is not None:
        yield None
        return
    with merged(model, name) as merge:
        yield merge
