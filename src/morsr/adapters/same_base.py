"""Whether a file of adapters was made on the base that it meets: by the base's id, and by samples of its weights."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import Tensor, nn

from morsr.adapters.merge import MERGED
from morsr.adapters.whole import whole_parameters
from morsr.errors import WeightsError

_SAMPLES = 256


def check_base_id(
    path: str | os.PathLike[str], header: dict[str, Any], model: nn.Module, base_id: str, by_weights: bool
) -> None:
    """Refuse a file of a base with another id; with by_weights only if the samples of its weights differ or are absent.

    A base that holds merged adapters is never taken for the one that it came from.

    Raises:
        WeightsError: with both ids.
    """
    stored = header["base_id"]
    if not base_id or not stored or base_id == stored:
        return
    if by_weights and MERGED not in base_id + stored and _looks_alike(header, model):
        warnings.warn(f"{path}: made for the base {stored!r}, taken for {base_id!r}: their weights agree", stacklevel=3)
        return
    raise WeightsError(f"{path}: made for the base {stored!r}, not for {base_id!r}; load it on that one")


def _looks_alike(header: dict[str, Any], model: nn.Module) -> bool:
    """Whether all adapted weights have the fingerprints in the file, as far as a copy in half precision has them."""
    whole = header.get("whole", {})
    stored = {f"{layer['name']}.weight": layer["print"] for layer in header["layers"]}
    stored = {key: there for key, there in stored.items() if key not in whole}
    try:
        here = {key: fingerprint(weight) for key, weight in whole_parameters(model, list(stored)).items()}
    except WeightsError:
        return False
    known = bool(stored) and all(stored.values()) and all(here.values())
    return known and all(same_print(here[key], there, tolerance=1e-3) for key, there in stored.items())


def check_print(path: str | os.PathLike[str], name: str, weight: Tensor, stored: list[float]) -> None:
    """Refuse a layer whose weight does not have the fingerprint that is stored.

    Raises:
        WeightsError: with the name of the layer.
    """
    if not same_print(fingerprint(weight), stored):
        raise WeightsError(f"{path}: made for another base: the weights of {name} differ")


def fingerprint(weight: Tensor) -> list[float]:
    """Mean size of a sample of a weight and of its first half; equal to 1 % for one weight in whatever precision."""
    if weight.device.type == "meta":
        return []
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].abs().double()
    return [sample.mean().item(), sample[: max(1, sample.numel() // 2)].mean().item()]


def same_print(one: list[float], other: list[float], *, tolerance: float = 0.01) -> bool:
    """Whether two fingerprints may be of one weight; an empty one, of a weight trained whole, is never compared."""
    pairs = zip(one, other, strict=True) if one and other else ()
    return not any(abs(a - b) > tolerance * abs(b) + 1e-6 for a, b in pairs)
