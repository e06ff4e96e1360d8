"""Which layers can have an update beside them, and which can have it merged into their weight.

torch's own Linear and Conv2d can have both. A subclass with a forward of its own is tried out on a small input: what
gives another shape than torch's layer would cannot be adapted; what gives other values, as a convolution that
standardises its weight, cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.errors import ConfigError

_CLOSE = 0.03  # relative difference that rounding of half precision explains


def check_suitable(name: str, base: nn.Linear | nn.Conv2d, parents: Iterable[tuple[nn.Module, str]]) -> None:
    """Check that an update beside a layer has the effect that it should have.

    Args:
        name: of the layer, for the message.
        base: the layer.
        parents: modules that hold it, with its name in each.

    Raises:
        ConfigError: the layer is never called, or computes another thing than its kind of layer.
    """
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise ConfigError(f"{name}: torch's MultiheadAttention reads this layer's weight and never calls it")
    if any(key in ("linear1", "linear2") and _has_fast_path(parent) for parent, key in parents):
        raise ConfigError(
            f"{name}: in evaluation mode torch's TransformerEncoderLayer reads this layer's weight and never calls it; "
            "call torch.backends.mha.set_fastpath_enabled(False) first, or leave it out of the targets"
        )
    if not base.weight.is_floating_point():
        raise ConfigError(f"{name}: a weight of {base.weight.dtype} cannot be adapted")
    if _is_torchs(base):
        return
    kind = "Linear" if isinstance(base, nn.Linear) else "Conv2d"
    inputs = _trial(base)
    weight = torch.empty(base.weight.shape, device="meta")
    expected = tuple(_as_torch(base, inputs.to(weight), weight, None).shape)
    try:
        with torch.no_grad():
            output = base.forward(inputs)
        got: object = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    except Exception as error:  # whatever a forward that is not ours may raise
        got = f"{type(error).__name__}: {error}"
    if got != expected:
        raise ConfigError(
            f"{name}: {type(base).__name__} has a forward of its own, and its output is no {kind}'s: expected "
            f"{expected} for an input {tuple(inputs.shape)}, got {got}; leave it out of the targets, or replace it by "
            f"a {kind} of torch and what it does besides"
        )


@torch.no_grad()
def uses_weight(base: nn.Linear | nn.Conv2d) -> bool | None:
    """Whether a layer computes with its weight as it is; None where that cannot be tried out now.

    The trial puts other numbers in the place of the weight for a moment.
    """
    if _is_torchs(base):
        return True
    weight = base._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
    numbers = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))  # neither standardised nor unit
    try:
        base._parameters["weight"] = nn.Parameter(numbers.to(weight), requires_grad=False)
        inputs = _trial(base)
        expected, got = _as_torch(base, inputs, base.weight, base.bias).float(), base.forward(inputs).float()
        return bool((got - expected).norm() <= _CLOSE * expected.norm())
    except Exception:  # as above
        return False
    finally:
        base._parameters["weight"] = weight


def _has_fast_path(parent: nn.Module) -> bool:
    """Whether a module is torch's encoder layer with the settings under which it may skip its linear layers."""
    return (
        isinstance(parent, nn.TransformerEncoderLayer)
        and type(parent).forward is nn.TransformerEncoderLayer.forward
        and parent.self_attn.batch_first
        and torch.backends.mha.get_fastpath_enabled()
    )


def _is_torchs(base: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer runs torch's own forward."""
    own = type(base)
    if "forward" in base.__dict__:
        return False
    if isinstance(base, nn.Linear):
        return own.forward is nn.Linear.forward
    return own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward


def _trial(base: nn.Linear | nn.Conv2d) -> Tensor:
    """A small input that rises and falls; for convolutions of two sides, of which one is odd and one even."""
    weight = base.weight
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (2, weight.shape[1])
    else:
        side = max(d * (k - 1) + 2 * s for d, k, s in zip(base.dilation, weight.shape[2:], base.stride, strict=True))
        shape = (1, weight.shape[1] * base.groups, side + 3, side + 4)
    count = torch.Size(shape).numel()
    return torch.arange(count, device=weight.device).sin().to(weight.dtype).view(shape)


def _as_torch(base: nn.Linear | nn.Conv2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch's layer of the same settings would give."""
    if isinstance(base, nn.Linear):
        return F.linear(inputs, weight, bias)
    return nn.Conv2d._conv_forward(base, inputs, weight, bias)
