"""A frozen Linear or Conv2d with any number of adapter sets beside it.

Dimensions: R ranks, I input features per group, O output features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from morsr.adapters.config import MoRConfig
from morsr.adapters.state import LayerGates, SharedState
from morsr.adapters.suitable import uses_weight
from morsr.errors import ConfigError, InputError
from morsr.functional.lowrank import ConvGeometry, add_lowrank_conv2d, add_lowrank_linear, add_lowrank_weight

_ACCESS = 8  # multiply-adds that take as long as one access to memory, roughly

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def can_adapt(module: nn.Module) -> bool:
    """Whether a module is a layer that can be adapted."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


class RankSet(nn.Module):
    """Ranks of one adapter set on one layer: ``down`` (R, I) or (R, I, kh, kw), and ``up`` (R, O), zero at first."""

    def __init__(self, base: nn.Linear | nn.Conv2d, config: MoRConfig, index: int) -> None:
        super().__init__()
        dtype = base.weight.dtype if config.dtype == "base" else _DTYPES[config.dtype]
        options: dict[str, Any] = {"device": base.weight.device, "dtype": dtype}
        self.index = index
        self.scale = float(config.scale)
        ranks = config.stored_ranks
        self.down = nn.Parameter(torch.empty(ranks, *base.weight.shape[1:], **options))
        self.up = nn.Parameter(torch.zeros(ranks, base.weight.shape[0], **options))
        with torch.no_grad():
            if config.init == "gaussian":
                self.down.normal_(std=1 / config.num_ranks)
            else:
                nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"ranks={self.down.shape[0]}, down={tuple(self.down.shape)}, up={tuple(self.up.shape)}"

    def pick(self, gates: LayerGates, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of ``down`` and gated rows of ``up`` that work for the present routing, in the dtype to compute in.

        Without a batch dimension where all images share them: (r, ...) and (r, O); else (B, r, ...) and (B, r, O).
        """
        down: Tensor = self.down
        up: Tensor = self.up
        if gates.factors is None:
            scaled = up if self.scale == 1.0 else up.to(torch.promote_types(up.dtype, dtype)) * self.scale
            return down.to(dtype), scaled.to(dtype)
        factors = gates.factors
        if gates.ranks is None:
            factors = factors[0] if factors.shape[0] == 1 else factors
            return down.to(dtype), (up * factors[..., None]).to(dtype)
        if factors.shape[0] == 1:
            rows, factors = gates.ranks[0], factors[0]
            return down.index_select(0, rows).to(dtype), _gated_rows(up, rows, factors).to(dtype)
        batch, ranks = factors.shape
        rows = gates.ranks.flatten()
        down = down.index_select(0, rows).view(batch, ranks, *down.shape[1:])
        up = _gated_rows(up, rows, factors.flatten()).view(batch, ranks, -1)
        return down.to(dtype), up.to(dtype)

    def add_to_weight(
        self, weight: Tensor, gates: LayerGates, *, live: list[int] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer's weight with the ranks of one image folded in.

        Args:
            weight: of the base layer.
            gates: of one image, as the routing gives them.
            live: positions among the gates' ranks to add, all by default; what has factor 0 can be left out.
            out: where to write it; a new tensor if None.
        """
        if live is not None and gates.ranks is not None and gates.factors is not None:
            keep = torch.tensor(live, device=gates.ranks.device, dtype=torch.int64)
            gates = LayerGates(gates.ranks[:, keep], gates.factors[:, keep])
        ranks = self.pick(gates, torch.promote_types(self.down.dtype, torch.float32))
        return add_lowrank_weight(weight, *ranks, out=out)


class _GatedRows(torch.autograd.Function):
    """Rows of a matrix times a factor each, with no copy of the rows kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, rows, factors)
        return matrix.index_select(0, rows) * factors[:, None]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        matrix, rows, factors = ctx.saved_tensors
        to_matrix = to_factors = None
        if ctx.needs_input_grad[0]:
            to_matrix = torch.zeros_like(matrix, dtype=gradient.dtype)
            to_matrix = to_matrix.index_add_(0, rows, gradient * factors[:, None]).to(matrix.dtype)
        if ctx.needs_input_grad[2]:
            to_factors = (gradient * matrix.index_select(0, rows)).sum(dim=-1).to(factors.dtype)
        return to_matrix, None, to_factors


def _gated_rows(matrix: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (matrix.requires_grad or factors.requires_grad):
        return _GatedRows.apply(matrix, rows, factors)  # type: ignore[no-any-return,no-untyped-call]
    return matrix.index_select(0, rows) * factors[:, None]


class AdaptedLayer(nn.Module):
    """Wrapper around one frozen layer; what it does not have itself it takes from ``base_layer``.

    Attributes:
        base_layer: the layer as it was, frozen.
        sets: adapter sets by name.
        contexts: routing contexts that live here; the first layer of a set carries its context, so that it moves,
            trains and is saved with the model and is registered once.
        reads: how often the weight was read from outside since the last call, while a set of this layer worked.
    """

    reads = 0

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, shared: SharedState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sets = nn.ModuleDict()
        self.contexts = nn.ModuleDict()
        self.shared = shared
        shared.layers.append(self)
        self.training = base_layer.training
        self._is_conv = isinstance(base_layer, nn.Conv2d)
        self._uses_weight = uses_weight(base_layer)

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer; with ``merged`` open, the merged one."""
        if not torch.compiler.is_compiling():
            self.shared.note_read(self)
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base_layer.bias

    def can_merge(self) -> bool:
        """Whether ranks in the weight act as they do beside it.

        Not where the weight is computed from other parameters (weight_norm, spectral_norm, prune), which the sum would
        not reach, and not where the layer changes it before use.
        """
        base: nn.Linear | nn.Conv2d = self.base_layer  # type: ignore[assignment]
        if base._parameters.get("weight") is None:
            return False
        if self._uses_weight is None:
            self._uses_weight = uses_weight(base)
        return bool(self._uses_weight)

    def __getattr__(self, name: str) -> Any:
        # Model code reads in_channels, padding, out_features and the like on the layers it built.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output plus the update of the active set, in the base layer's dtype."""
        # Straight from the dict: torch's and our attribute lookup would cost more than the check itself.
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        state = self.shared.current()
        sets = self._modules["sets"]._modules
        if state.active is None or state.active not in sets:
            return base(input)
        rows = state.gates[state.active]
        if rows is None:
            raise InputError(f"adapter set {state.active!r} has no routing: set context.condition to the scores first")
        if state.is_merged:
            return base(input)
        if self.reads:
            self.reads = 0
        if self._is_conv and input.ndim == 3:  # one image without a batch dimension, as torch's own layers take it
            return self.forward(input[None])[0]
        ranks: RankSet = sets[state.active]  # type: ignore[assignment]
        gates = rows[ranks.index]
        if gates.factors is not None and gates.factors.shape[0] not in (1, input.shape[0]):
            raise InputError(
                f"the routing of set {state.active!r} is for {gates.factors.shape[0]} images, but a layer got a batch "
                f"of {input.shape[0]}; set context.condition for this batch, or a routing of one image for all of it"
            )
        if gates.fold and self._folding_pays(input, gates, ranks.down.shape[0]):
            return self._folded(input, ranks, gates)
        inputs, output = _called(base, input) if base._forward_pre_hooks else (input, base(input))
        if output.dtype == torch.float32 and (inputs.dtype != torch.float32 or _autocasts(inputs)):
            # A layer that keeps to float32 in a network that runs in less; so does its update.
            with torch.autocast(inputs.device.type, enabled=False):
                return self._updated(output, inputs.float(), ranks, gates)
        if output.dtype != inputs.dtype and not _autocasts(inputs):
            raise ConfigError(f"a layer turns {inputs.dtype} into {output.dtype}; adapters need one dtype")
        return self._updated(output, inputs, ranks, gates)

    def _folding_pays(self, inputs: Tensor, gates: LayerGates, stored: int) -> bool:
        """Whether one call costs less with the ranks added to the weight first than beside the layer.

        Decided from shapes alone. Not in half precision, where rounding the sum would lose a part of the update; not
        where gradients are wanted, which would be those of the whole weight.
        """
        base: nn.Linear | nn.Conv2d = self._modules["base_layer"]  # type: ignore[assignment]
        if torch.is_grad_enabled() or type(base) not in (nn.Linear, nn.Conv2d):
            return False
        if gates.factors is not None and gates.factors.shape[0] != 1:
            return False
        weight = base.weight
        if inputs.dtype != weight.dtype or weight.dtype not in (torch.float32, torch.float64) or _autocasts(inputs):
            return False
        if base._forward_hooks or base._forward_pre_hooks:  # they would not see the call
            return False
        ranks = stored if gates.ranks is None else gates.ranks.shape[1]
        outputs, fan_in = weight.shape[0], weight.numel() // weight.shape[0]
        positions = inputs.numel() // inputs.shape[1 if self._is_conv else -1]
        if self._is_conv:
            positions //= math.prod(base.stride)  # type: ignore[arg-type]
            fan_in *= base.groups  # type: ignore[assignment]
        # Multiply-adds, and accesses to memory as what could have been computed meanwhile.
        beside = positions * (ranks * (fan_in + outputs) + _ACCESS * outputs)
        return weight.numel() * (ranks + 2 * _ACCESS) < beside

    def _folded(self, inputs: Tensor, ranks: RankSet, gates: LayerGates) -> Tensor:
        """The base layer with the ranks in a temporary weight."""
        base: nn.Linear | nn.Conv2d = self._modules["base_layer"]  # type: ignore[assignment]
        weight = ranks.add_to_weight(base.weight, gates)
        if isinstance(base, nn.Linear):
            return F.linear(inputs, weight, base.bias)
        return base._conv_forward(inputs, weight, base.bias)

    def _updated(self, output: Tensor, inputs: Tensor, ranks: RankSet, gates: LayerGates) -> Tensor:
        base: nn.Linear | nn.Conv2d = self._modules["base_layer"]  # type: ignore[assignment]
        down, up = ranks.pick(gates, inputs.dtype)
        # A hook of the base layer may have kept its output, which must then stay what the base layer computed.
        in_place = not (torch.is_grad_enabled() or base._forward_hooks)
        if isinstance(base, nn.Linear):
            return add_lowrank_linear(output, inputs, down, up, in_place=in_place)
        return add_lowrank_conv2d(output, inputs, down, up, _geometry(base), in_place=in_place)


def _geometry(base: nn.Conv2d) -> ConvGeometry:
    """Read at every call: models change strides, dilations and borders of layers that they have."""
    return ConvGeometry(
        base.stride,  # type: ignore[arg-type]
        base.padding,  # type: ignore[arg-type]
        base.dilation,  # type: ignore[arg-type]
        base.groups,
        base.padding_mode,
        base._reversed_padding_repeated_twice,  # type: ignore[arg-type]
    )


def _called(base: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer with forward pre-hooks computes from, which they may have changed, and its output."""
    seen: list[Tensor] = []
    handle = base.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        output: Tensor = base(inputs)
    finally:
        handle.remove()
    return seen[0], output


def _autocasts(inputs: Tensor) -> bool:
    return torch.is_autocast_enabled(inputs.device.type)
