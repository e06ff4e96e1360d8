"""What all adapted layers of a model share: which set works, and with which gates.

A layer looks here in its forward. Activation checkpointing runs a layer a second time, during the backward pass, when
another set may have been active since; so the state keeps a short history, keyed by autograd's sequence numbers, and a
recomputed layer is given the state under which the node that asks for the recomputation was made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from morsr.adapters.layer import AdaptedLayer
    from morsr.adapters.router import RoutingContext

_HISTORY = 512  # changes of state between a forward pass and its backward pass


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


class SharedState:
    """Mutable state behind all adapted layers of a model. Not a module: it owns no weights."""

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []
        self.contexts: dict[str, RoutingContext] = {}
        self.now = State(None, {}, False)
        self._times: list[int] = [0]
        self._states: list[State] = [self.now]
        self._dropped = False

    def change(self, **fields: Any) -> None:
        """Go on with other fields of State, and remember when."""
        self.now = self.now._replace(**fields)
        time = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if self._times[-1] >= time:
            # No node was made under the last entry (or another thread counts here): it needs no place of its own.
            self._states[-1] = self.now
            return
        self._times.append(time)
        self._states.append(self.now)
        if len(self._times) > _HISTORY:
            del self._times[0], self._states[0]
            self._dropped = True

    def set_gates(self, name: str, gates: tuple[LayerGates, ...] | None) -> None:
        """Give the layers of one set their gates."""
        self.change(gates={**self.now.gates, name: gates})

    def current(self) -> State:
        """The state that counts for the layer that asks: now, or then if it is being recomputed in a backward pass."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.now
        node = torch._C._current_autograd_node()
        if node is None:
            return self.now
        index = bisect_right(self._times, node._sequence_nr()) - 1
        if index < 0:
            if self._dropped:
                raise RuntimeError(
                    f"the routing changed more than {_HISTORY} times between a checkpointed forward and its backward"
                )
            index = 0
        return self._states[index]

    @contextmanager
    def restored(self, state: State) -> Iterator[None]:
        """Run a block under an earlier state, which leaves no trace in the history."""
        before, self.now = self.now, state
        try:
            yield
        finally:
            self.now = before

    def __getstate__(self) -> dict[str, Any]:
        # Gates carry autograd history, which can be neither copied nor pickled; a copy starts without a condition.
        now = self.now._replace(gates=dict.fromkeys(self.now.gates), is_merged=False)
        for name, context in self.contexts.items():
            if not context.config.is_routed:
                now.gates[name] = self.now.gates.get(name)
        return {**self.__dict__, "now": now, "_times": [0], "_states": [now], "_dropped": False}
