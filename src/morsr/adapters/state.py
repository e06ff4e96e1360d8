"""What all adapted layers of a model share: which set works, and with which gates.

A layer looks here in its forward. Activation checkpointing runs a layer a second time, during the backward pass, when
another set may have been active since; so the state keeps a short history, keyed by autograd's sequence numbers, and a
recomputed layer is given the state under which the node that asks for the recomputation was made. Every thread counts
its own sequence numbers, so every thread has its own history.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from morsr.errors import ConfigError

if TYPE_CHECKING:
    from morsr.adapters.layer import AdaptedLayer
    from morsr.adapters.router import RoutingContext

_HISTORY = 512  # changes of state between a forward pass and its backward pass
_READS = 64  # how often a layer's weight is read without one call until this is said
_KEY = "morsr.adapters.state"


class LayerGates(NamedTuple):
    """What one layer needs of the routing.

    Attributes:
        ranks: (B, r) indices of the ranks that work, or None for all of them.
        factors: (B, r) what each of them is multiplied by, scale included; or None for the scale alone.
        fold: whether a layer may add its ranks to its weight for one call, where that is less work.
    """

    ranks: Tensor | None
    factors: Tensor | None
    fold: bool = False


class State(NamedTuple):
    """One moment: the active set, and per set the gates of its layers (None where no condition is set)."""

    active: str | None
    gates: dict[str, tuple[LayerGates, ...] | None]
    is_merged: bool


class _History:
    """States of the layers as one thread saw them, each with the thread's sequence number from which it counts."""

    def __init__(self, time: int, state: State) -> None:
        self.times, self.states = [time], [state]
        self.dropped = False

    def add(self, time: int, state: State) -> None:
        if self.times[-1] >= time:  # no node was made under the last entry: it needs no place of its own
            self.states[-1] = state
            return
        self.times.append(time)
        self.states.append(state)
        if len(self.times) > _HISTORY:
            del self.times[0], self.states[0]
            self.dropped = True

    def at(self, time: int) -> State:
        index = bisect_right(self.times, time) - 1
        if index < 0 and self.dropped:
            raise RuntimeError(
                f"the routing changed more than {_HISTORY} times between a checkpointed forward and its backward"
            )
        return self.states[max(index, 0)]


def _histories() -> WeakKeyDictionary[SharedState, _History]:
    """Histories of this thread; autograd's own threads find those of the thread that called backward.

    A node does not say whose it is, so a thread that runs forward passes of its own is expected to run their backward.
    """
    tls: Any = torch._C
    if not tls._is_key_in_tls(_KEY):
        tls._stash_obj_in_tls(_KEY, WeakKeyDictionary())
    return tls._get_obj_in_tls(_KEY)  # type: ignore[no-any-return]


class SharedState:
    """Mutable state behind all adapted layers of a model. Not a module: it owns no weights."""

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []
        self.contexts: dict[str, RoutingContext] = {}
        self.now = State(None, {}, False)
        self._latest = _History(0, self.now)  # of the thread that worked last
        self._thread: threading.Thread | None = None
        self._warned = False

    def change(self, **fields: Any) -> None:
        """Go on with other fields of State, and remember when."""
        self.now = self.now._replace(**fields)
        self._remember()

    def _remember(self) -> None:
        histories = _histories()
        time = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        history = histories.get(self)
        if history is None:
            history = histories[self] = _History(time, self.now)
        else:
            history.add(time, self.now)
        self._latest, self._thread = history, threading.current_thread()

    def set_gates(self, name: str, gates: tuple[LayerGates, ...] | None) -> None:
        """Give the layers of one set their gates."""
        self.change(gates={**self.now.gates, name: gates})

    def current(self) -> State:
        """The state that counts for the layer that asks: now, or then if it is being recomputed in a backward pass."""
        if torch.compiler.is_compiling():
            return self.now
        if torch._C._current_graph_task_id() == -1:
            if self._thread is not threading.current_thread():
                self._remember()
            return self.now
        node = torch._C._current_autograd_node()
        if node is None:
            return self.now
        # A thread without a history runs the backward pass of another one's forward pass.
        return _histories().get(self, self._latest).at(node._sequence_nr())

    @contextmanager
    def restored(self, state: State) -> Iterator[None]:
        """Run a block under an earlier state, which leaves no trace in the history."""
        before, self.now = self.now, state
        try:
            yield
        finally:
            self.now = before

    def note_read(self, layer: AdaptedLayer) -> None:
        """Warn once where model code reads weights again and again and never calls their layers, so no rank works."""
        name = self.now.active
        if self.now.is_merged or name is None or name not in layer.sets:
            return
        layer.reads += 1
        if layer.reads < _READS or self._warned:
            return
        self._warned = True
        names = self.contexts[name].layer_names
        # The others of a model that works so are as far as this one, or one pass behind.
        idle = [names[x.sets[name].index] for x in self.layers if name in x.sets and x.reads >= _READS - 1]  # type: ignore[index]
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        warnings.warn(
            f"the weights of adapted layers are read, but the layers were not called in {_READS} reads: set {name!r} "
            f"has no effect in {', '.join(idle[:3])}{more}. Leave them out of the targets, or merge the set",
            stacklevel=3,
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.now.is_merged:
            raise ConfigError(
                "the model is merged, and a copy would have the ranks in its weights and beside them; "
                "leave merged(...) before copying or pickling it"
            )
        # Gates carry autograd history, which can be neither copied nor pickled; a copy starts without a condition.
        now = self.now._replace(gates=dict.fromkeys(self.now.gates))
        for name, context in self.contexts.items():
            if not context.config.is_routed:
                now.gates[name] = self.now.gates.get(name)
        return {**self.__dict__, "now": now, "_latest": _History(0, now), "_thread": None}
