"""An adapted layer: the frozen base layer, the ranks of every set on it, and the switch that all layers look at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from morsr.adapters.config import MoRConfig
from morsr.errors import ConfigError, InputError
from morsr.functional.lowrank import lowrank_update, merged_weight
from morsr.functional.precision import without_autocast


class Switch:
    """Which set is active in a model, and the gates of every set: one tensor (B, R) per layer.

    Attributes:
        active: name of the active set, None for the base alone.
        gates: by set; None until a routing is set.
        reports: by set, what `inject` returned.
    """

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.gates: dict[str, tuple[Tensor, ...] | None] = {}
        self.reports: dict[str, Any] = {}

    @contextlib.contextmanager
    def set(self, active: str | None, gates: dict[str, tuple[Tensor, ...] | None] | None = None) -> Iterator[None]:
        """Another active set, and other gates if given, inside a ``with`` block."""
        before = self.active, self.gates
        self.active, self.gates = active, self.gates if gates is None else gates
        try:
            yield
        finally:
            self.active, self.gates = before

    def checkpoint(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Activation checkpointing that recomputes under the set and gates of the first run.

        For diffusers' ``enable_gradient_checkpointing(function)``: by the time of the backward pass another set may be
        active, or another batch routed.
        """
        then = self.active, dict(self.gates)
        contexts = lambda: (contextlib.nullcontext(), self.set(*then))  # noqa: E731
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Gates may carry a graph, which can be neither copied nor pickled.
        gates = {k: rows and tuple(row.detach() for row in rows) for k, rows in self.gates.items()}
        return {**self.__dict__, "gates": gates}


class Ranks(nn.Module):
    """The ranks of one set on one layer: ``lora_A`` (R, ...) and ``lora_B`` (O, R), which starts at zero."""

    constant: Tensor | None

    def __init__(self, base: Any, config: MoRConfig, index: int) -> None:
        super().__init__()
        self.index, weight = index, base.weight
        shape = (config.num_ranks, *weight.shape[1:])
        self.lora_A = nn.Parameter(torch.empty(shape, device=weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(len(weight), shape[0], device=weight.device, dtype=torch.float32))
        # A plain LoRA's gates are the constant 1; a buffer, so that it moves with the model.
        constant = None if config.num_slots else torch.full((1, shape[0]), float(config.scale), device=weight.device)
        self.register_buffer("constant", constant, persistent=False)
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.num_ranks)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.lora_A.ndim == 4:
            self.lora_A.data = self.lora_A.data.contiguous(memory_format=torch.channels_last)


class AdaptedLayer(nn.Module):
    """A module of the base and what sets add to it: ranks beside a Linear or Conv2d, or a copy that is trained whole.

    The copy runs while its set is active, as peft's modules_to_save; the frozen teacher and the discriminator, which
    run without the set, see the original.
    """

    sets: Any
    merged: str | None

    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer, self.switch, self.merged = base, switch, None
        self.sets = nn.ModuleDict()  # ranks, by set
        self.copies = nn.ModuleDict()
        self.routers = nn.ModuleDict()  # of the sets whose first layer this is

    def __getattr__(self, name: str) -> Any:
        # Model code reads in_channels, weight and the like.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.switch.active
        layer = self.torch_layer(name)
        output = layer(*args, **kwargs)
        if self.merged is not None:
            if name != self.merged:
                raise ConfigError(f"set {self.merged!r} is merged into the weights; leave merged(...) first")
            return output
        if name is None or name not in self.sets:
            return output
        x, ranks, gates = (*args, *kwargs.values())[0], self.sets[name], self.gates(name)
        batch = len(x) if x.ndim > (3 if isinstance(layer, nn.Conv2d) else 1) else 1
        if len(gates) not in (1, batch):
            raise InputError(f"the routing is for {len(gates)} images, the layer got a batch of {batch}")
        # In the precision of the layer's output, whatever autocast would make of it: some layers stay in float32.
        with without_autocast(x.device):
            return output + lowrank_update(x.to(output.dtype), ranks.lora_A, ranks.lora_B, gates, layer)

    def gates(self, name: str) -> Tensor:
        """The gates (B, R) of a set on this layer; (1, R) for a plain LoRA."""
        ranks = self.sets[name]
        if ranks.constant is not None:
            return ranks.constant
        rows = self.switch.gates[name]
        if rows is None:
            raise InputError(f"adapter set {name!r} has no routing; call report.route(scores) first")
        return rows[ranks.index]

    def torch_layer(self, name: str | None) -> Any:
        """The module that runs while a set is active."""
        return self.copies[name] if name is not None and name in self.copies else self.base_layer

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """The layer's weight with the ranks of a set added, for the routing of one image."""
        ranks, gates = self.sets[name], self.gates(name)
        if len(gates) != 1:
            raise InputError(f"merged weights hold the ranks of one image, got a routing of {len(gates)}")
        return merged_weight(self.torch_layer(name).weight, ranks.lora_A, ranks.lora_B, gates[0])
