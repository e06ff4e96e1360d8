"""Adapter files of release 0.1 (formats 1 and 2) under the names of the present format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from morsr.adapters.inject import module_places
from morsr.adapters.router import QUANTILES


def upgraded(
    parameters: Sequence[str], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[list[str], dict[str, Tensor]]:
    """Modules to save and tensors as a file of the present format names them.

    Release 0.1 transposed ``lora_B``, knew no distribution of severities, and kept single parameters that are trained
    whole: the largest modules of the base `model` that these make up are saved here.
    """
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "layers" and rest.endswith(".down"):
            found[f"layers.{rest.removesuffix('.down')}.lora_A"] = value
        elif kind == "layers" and rest.endswith(".up"):
            found[f"layers.{rest.removesuffix('.up')}.lora_B"] = value.t().contiguous()
        elif key == "context.severity_mean":
            found["router.severities"] = torch.linspace(0, 1, QUANTILES)
        else:
            found[f"router.{rest}" if kind == "context" else key] = value
    whole, modules = set(parameters), list[str]()
    for place in module_places(model) if whole else ():
        keys = [f"{place.name}.{key}" for key, _ in place.original.named_parameters()]
        if keys and whole.issuperset(keys) and not place.name.startswith(tuple(f"{one}." for one in modules)):
            modules.append(place.name)
    for module in modules:
        for key in [key for key in found if key.startswith(f"whole.{module}.")]:
            found[f"saved.{module}:{key.removeprefix(f'whole.{module}.')}"] = found.pop(key)
    return modules, found
