"""Parameters of the base that are trained whole beside the ranks, and kept in the same file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from morsr.adapters.inject import adapted_layers, routing_context
from morsr.adapters.layer import AdaptedLayer
from morsr.adapters.targets import expand_targets, matches
from morsr.errors import ConfigError, WeightsError


def whole_parameters(
    model: nn.Module, names: Iterable[str] | Mapping[str, Sequence[int]], *, path: str | os.PathLike[str] = ""
) -> dict[str, nn.Parameter]:
    """Parameters of the base by the names that they have without adapters, checked against shapes where given.

    Raises:
        WeightsError: a name that the model does not have, or another shape.
    """
    found: dict[str, nn.Parameter] = {}
    for name in names:
        layer_name, _, key = name.rpartition(".")
        try:
            layer = model.get_submodule(layer_name)
            found[name] = getattr(layer.base_layer if isinstance(layer, AdaptedLayer) else layer, key)
        except AttributeError as error:
            raise WeightsError(f"{path}: made for another base: there is no parameter {name} here") from error
        if isinstance(names, Mapping) and tuple(found[name].shape) != tuple(names[name]):
            raise WeightsError(
                f"{path}: made for another base: {name} has shape {tuple(names[name])} there, "
                f"{tuple(found[name].shape)} here"
            )
    return found


def train_whole(model: nn.Module, patterns: Sequence[str], *, name: str = "generator") -> list[nn.Parameter]:
    r"""Let parameters of the base take gradients, and have them saved with a set of adapters.

    Low ranks save nothing on a narrow layer, a bias or a norm. OSEDiff trains the first convolution of the UNet in this
    way (osediff.py); a small decoder is another case. To be called when all sets have been injected, since that freezes
    the base.

    Args:
        model: the base, adapters injected.
        patterns: regular expressions of whole parameter names without adapters, as ``vae\.decoder\..*``.
        name: of the set whose file is to hold them.

    Returns:
        The parameters, each once, in the model's order.

    Raises:
        ConfigError: a pattern that fits no parameter of the base, or a parameter that is not float32, in whose steps
            the updates of a small learning rate would be lost.
    """
    context = routing_context(model, name)
    added = {
        id(p) for _, layer in adapted_layers(model) for p in (*layer.sets.parameters(), *layer.contexts.parameters())
    }
    names = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in model.named_parameters()
        if id(parameter) not in added
    }
    chosen: dict[str, nn.Parameter] = {}
    for target, compiled in expand_targets(patterns):
        found = {key: p for key, p in names.items() if any(matches(pattern, key) for pattern in compiled)}
        if not found:
            raise ConfigError(
                f"whole: {target!r} fits no parameter of the base, which has {next(iter(names))} and others"
            )
        chosen.update(found)
    chosen = {key: parameter for key, parameter in names.items() if key in chosen}
    for key, parameter in chosen.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"whole: {key} is stored as {parameter.dtype}; training it needs base_dtype float32")
        parameter.requires_grad_(True)
    context.trained_whole = tuple(chosen)
    return list(chosen.values())
