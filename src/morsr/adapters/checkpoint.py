"""Adapter files: one safetensors file per set, with its settings and its base in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import (
    InjectionReport,
    adapted_layers,
    adapter_names,
    inject,
    layers_of_set,
    plan_injection,
    report_of,
    routing_context,
    shared_state,
)
from morsr.adapters.router import RoutingContext
from morsr.adapters.same_base import check_base_id, check_print, fingerprint
from morsr.adapters.whole import whole_parameters
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors

FORMAT = "morsr-adapters"
FORMAT_VERSION = 2
"""1: ranks and router. 2: also parameters of the base trained whole, or attached tensors; where there are any."""
_SAVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_adapters(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    name: str = "generator",
    base_id: str = "",
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
    attached: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one adapter set to a safetensors file; an existing file is replaced in one step.

    Parameters of the base that the set's context names as ``whole`` are stored beside the ranks.

    Args:
        path: of the file.
        model: an adapted model; the names of its layers are stored as seen from it.
        name: of the set.
        base_id: what the base model is called, as "tiny" or a hub id; a load with another id is refused.
        dtype: to store the ranks in, as torch.float16; their own by default. Router and statistics stay in float32.
        extra: values that fit JSON, given back by ``read_adapters_header``.
        attached: tensors that go with the set, such as prompt embeddings, given back by ``read_attached``.

    Raises:
        ConfigError: no such set, an open merge, or a dtype that is no floating-point type or too small for the ranks.
        InputError: ``extra`` does not fit JSON.
        WeightsError: NaN or infinity, which no load would take. The file stays as it was then, as in all other cases.
    """
    path = Path(path)
    layers = layers_of_set(model, name)
    context = routing_context(model, name)
    if shared_state(model).now.is_merged:
        raise ConfigError("the model is merged; leave merged(...) before saving adapters")
    if len(layers) != len(context.layer_names):
        raise ConfigError(
            f"this part of the model holds {len(layers)} of the {len(context.layer_names)} layers of set {name!r}; "
            "save from the model that inject was given"
        )
    if dtype is not None and dtype not in _SAVE_DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(map(str, _SAVE_DTYPES))}, got {dtype}")
    whole = {key: parameter.detach() for key, parameter in whole_parameters(model, context.whole).items()}
    header = {
        "config": context.config.to_dict(),
        "name": name,
        "base_id": base_id,
        "condition_dim": context.condition_dim,
        "condition_names": list(context.condition_names),
        "layers": [
            {
                "name": layer_name,
                "shape": list(layer.weight.shape),
                "print": [] if f"{layer_name}.weight" in whole else fingerprint(layer.weight),
            }
            for layer_name, layer, _ in layers
        ],
        **({"attached": {key: list(value.shape) for key, value in attached.items()}} if attached else {}),
        **({"whole": {key: list(value.shape) for key, value in whole.items()}} if whole else {}),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra: expected values that fit JSON: {error}") from error
    tensors: dict[str, Tensor] = {}
    for layer_name, _, ranks in layers:
        for key in ("down", "up"):
            value = getattr(ranks, key).detach()
            stored = value.to("cpu", dtype or value.dtype).contiguous()
            if dtype is not None and not stored.isfinite().all() and value.isfinite().all():
                raise ConfigError(
                    f"dtype: {dtype} cannot hold {value.abs().max().item():.4g}, the largest number of "
                    f"layers.{layer_name}.{key}; store torch.bfloat16 or torch.float32"
                )
            tensors[f"layers.{layer_name}.{key}"] = stored
    for key, value in context.state_dict().items():
        tensors[f"context.{key}"] = value.detach().to("cpu").contiguous()
    tensors |= {f"whole.{key}": value.to("cpu").contiguous() for key, value in whole.items()}
    # Copies: one tensor may be attached under two names, which the format does not take.
    tensors |= {f"attached.{key}": value.detach().cpu().clone().contiguous() for key, value in (attached or {}).items()}
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise WeightsError(
            f"adapter set {name!r} is not saved: {_some(broken)} hold NaN or infinity, which no load would take; "
            "go on from the last file or checkpoint that is whole"
        )
    metadata = {"format": FORMAT, "format_version": "2" if whole or attached else "1", "header": text}
    save_tensors(path, tensors, metadata)
    return path


def read_adapters_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Header of an adapter file, without its tensors.

    Returns:
        A dict with config (of MoRConfig), name, base_id, condition_dim, condition_names, layers (name, shape, print),
        extra, format_version and, where parameters of the base were trained whole, whole (their names and shapes).

    Raises:
        WeightsError: the file is missing, cut short, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such adapter file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: a safetensors file, but not one of morsr's adapters; a peft LoRA goes through import_lora"
        )
    try:
        version = int(metadata["format_version"])
        header = json.loads(metadata["header"])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its header cannot be read ({error})") from error
    if version > FORMAT_VERSION:
        raise WeightsError(
            f"{path}: written in format {version}, this version reads up to {FORMAT_VERSION}; update morsr"
        )
    return {**header, "format_version": version}


def read_attached(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors that were attached to the set of an adapter file; none in most.

    Raises:
        WeightsError: an unreadable file.
    """
    names = read_adapters_header(path).get("attached", {})
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(f"attached.{name}") for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); copy or download it again") from error


def load_adapters(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    name: str | None = None,
    base_id: str = "",
    check_base: bool = True,
    by_weights: bool = False,
) -> InjectionReport:
    """Load an adapter file into a model; the set is injected if the model lacks it.

    Parameters of the base that the file holds whole take the place of the model's own, for good.

    Args:
        path: of the file.
        model: the model it was saved from, or its twin.
        name: to load the set under; the stored name by default.
        base_id: what the base model is called; compared with the stored id where both are known.
        check_base: compare samples of the base weights with those stored; off for a base that was trained on.
        by_weights: where the ids differ, let the samples decide, with a warning where they are equal: a base is often
            known by no more than the name of its folder.

    Raises:
        WeightsError: an unreadable file, another base, missing or unexpected layers or tensors, other shapes, or a
            set of that name with other settings or scores. Nothing has changed then.
    """
    header = read_adapters_header(path)
    config = _config(path, header)
    name = name or str(header["name"])
    check_base_id(path, header, model, base_id, by_weights)
    tensors = read_tensors(path, header)
    is_there = name in adapter_names(model)
    if any(layer.shared.now.is_merged for _, layer in adapted_layers(model)):
        raise ConfigError("the model is merged; leave merged(...) before loading adapters")
    if is_there:
        present = [(layer_name, layer.weight) for layer_name, layer, _ in layers_of_set(model, name)]
        context = routing_context(model, name)
        _check_same(path, context.config, config, context.condition_dim, header)
        check_scores(path, header, context)
    else:
        try:
            plan = plan_injection(model, config, name)
        except ConfigError as error:
            raise WeightsError(f"{path}: does not fit this model: {error}") from error
        present = [(layer_name, candidate.base.weight) for layer_name, candidate in plan.matched]
    check_layers(path, header, present, check_base)
    whole = whole_parameters(model, header.get("whole", {}), path=path)
    if is_there:
        report = report_of(model, name)
    else:
        report = inject(
            model,
            config,
            condition_dim=header["condition_dim"] or None,
            name=name,
            condition_names=header["condition_names"],
        )
    with torch.no_grad():
        for layer_name, _, ranks in layers_of_set(model, name):
            ranks.down.copy_(tensors[f"layers.{layer_name}.down"])
            ranks.up.copy_(tensors[f"layers.{layer_name}.up"])
        for key, value in report.context.state_dict().items():
            value.copy_(tensors[f"context.{key}"])
        for key, parameter in whole.items():
            parameter.copy_(tensors[f"whole.{key}"])
    report.context.whole = tuple(whole)
    report.context.condition_names = tuple(header["condition_names"])
    report.context.condition = None
    return report


def _config(path: str | os.PathLike[str], header: dict[str, Any]) -> MoRConfig:
    try:
        return MoRConfig.from_dict(header["config"])
    except (ConfigError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: its settings cannot be read ({error})") from error


def read_tensors(path: str | os.PathLike[str], header: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the file, checked for completeness and shape against its own header.

    Raises:
        WeightsError: an unreadable file or setting, missing or unexpected tensors, other shapes, NaN or infinity.
    """
    config = _config(path, header)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); copy or download it again") from error
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in header["layers"]:
        wanted[f"layers.{layer['name']}.down"] = (config.stored_ranks, *layer["shape"][1:])
        wanted[f"layers.{layer['name']}.up"] = (config.stored_ranks, layer["shape"][0])
    names = [layer["name"] for layer in header["layers"]]
    skeleton = RoutingContext(config, names, header["condition_dim"], device=torch.device("meta"))
    wanted |= {f"context.{key}": tuple(value.shape) for key, value in skeleton.state_dict().items()}
    for kind in ("whole", "attached"):
        wanted |= {f"{kind}.{key}": tuple(shape) for key, shape in header.get(kind, {}).items()}
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise WeightsError(f"{path}: missing tensors {_some(missing)}; unexpected tensors {_some(unexpected)}")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise WeightsError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}")
        if not tensors[key].isfinite().all():
            raise WeightsError(f"{path}: {key} holds NaN or infinity")
    return tensors


def comparable_settings(config: MoRConfig) -> dict[str, Any]:
    """Settings that change what a set computes; those of its training are left out."""
    free = {"targets", "logit_noise", "logit_noise_until", "router_init_std", "init", "dtype"}
    return {key: value for key, value in config.to_dict().items() if key not in free and not key.startswith("balance")}


def _check_same(
    path: str | os.PathLike[str], have: MoRConfig, stored: MoRConfig, condition_dim: int, header: dict[str, Any]
) -> None:
    mine, theirs = comparable_settings(have), comparable_settings(stored)
    differing = [f"{key}={theirs[key]!r} (here {mine[key]!r})" for key in mine if mine[key] != theirs[key]]
    if header["condition_dim"] != condition_dim:
        differing.append(f"condition_dim={header['condition_dim']} (here {condition_dim})")
    if differing:
        raise WeightsError(f"{path}: the model has this set with other settings: {', '.join(differing)}")


def check_scores(path: str | os.PathLike[str], header: dict[str, Any], context: RoutingContext) -> None:
    """Refuse a file whose router reads other scores than a set's, or the same in another order, where both are known.

    Raises:
        WeightsError: with both lists.
    """
    there, here = header["condition_names"], list(context.condition_names)
    if there and here and there != here:
        raise WeightsError(
            f"{path}: its router reads the scores {', '.join(there)}, this set's reads {', '.join(here)}; use the "
            "estimator that it was trained with"
        )


def check_layers(
    path: str | os.PathLike[str], header: dict[str, Any], present: list[tuple[str, Tensor]], check_base: bool
) -> None:
    """Refuse a file of other layers, shapes or, with check_base, weights than the (name, weight) pairs here."""
    stored = {layer["name"]: layer for layer in header["layers"]}
    names = [name for name, _ in present]
    missing, unexpected = [n for n in names if n not in stored], [n for n in stored if n not in names]
    if missing or unexpected:
        raise WeightsError(
            f"{path}: made for another base: no ranks for layers {_some(missing)}; "
            f"layers {_some(unexpected)} are not adapted here"
        )
    if names != list(stored):
        raise WeightsError(f"{path}: made for another base: the same layers stand in another order")
    for name, weight in present:
        shape = tuple(stored[name]["shape"])
        if tuple(weight.shape) != shape:
            raise WeightsError(
                f"{path}: made for another base: {name} has shape {shape} there, {tuple(weight.shape)} here"
            )
    if not check_base:
        return
    for name, weight in present:
        check_print(path, name, weight, stored[name]["print"])


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
