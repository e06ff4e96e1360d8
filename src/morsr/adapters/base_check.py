"""A base is known by samples of its adapted weights, never by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from morsr.adapters.inject import layers_of_set, module_places
from morsr.errors import WeightsError

_SAMPLES = 256


def prints_of_layers(model: nn.Module, name: str = "generator") -> list[dict[str, Any]]:
    """Name, shape and fingerprint of every base weight under a set, by which a base is known again."""
    return [
        {"name": layer_name, "shape": list(layer.weight.shape), "print": fingerprint(layer.weight)}
        for layer_name, layer, _ in layers_of_set(model, name)
    ]


def check_base(path: str | os.PathLike[str], header: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse adapters of other layers or weights than a model's; what the base is called does not count.

    Args:
        path: what the message calls the adapters.
        header: its layers (see `prints_of_layers`), base_id, and saved, the modules that were trained whole.
        model: the base, with or without adapters.

    Raises:
        WeightsError: with the first layer that differs.
    """
    places = {place.name: place.original for place in module_places(model)}
    known = f" (made for {header['base_id']!r})" if header.get("base_id") else ""
    for layer in header.get("layers", ()):
        name = layer["name"]
        weight = getattr(places.get(name), "weight", None)
        if not isinstance(weight, Tensor) or list(weight.shape) != layer["shape"]:
            got = "no such layer" if not isinstance(weight, Tensor) else f"shape {list(weight.shape)}"
            raise WeightsError(f"{path}: another base{known}: {name}: expected shape {layer['shape']}, got {got}")
        # an empty fingerprint, of the meta device, is never compared
        pairs = zip(fingerprint(weight), layer["print"], strict=False)
        if any(abs(found - stored) > 0.01 * abs(stored) + 1e-6 for found, stored in pairs):
            raise WeightsError(f"{path}: another base{known}: the weights of {name} differ")
    if missing := [one for one in header.get("saved", ()) if one not in places]:
        raise WeightsError(f"{path}: another base{known}: no module {missing[0]} here")


def fingerprint(weight: Tensor) -> list[float]:
    """Mean size of a sample of a weight and of its first half; equal to 1 % for one weight in whatever precision."""
    if weight.device.type == "meta":
        return []
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].abs().double()
    return [sample.mean().item(), sample[: max(1, sample.numel() // 2)].mean().item()]
