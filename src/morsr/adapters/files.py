"""Adapter files: one safetensors file per set, with its settings, its base and a digest in the header.

Layout of format 3: ``layers.<name>.lora_A``, ``layers.<name>.lora_B``, ``router.<key>``, ``saved.<module>:<key>``
(modules_to_save) and ``attached.<key>``. Formats 1 and 2, of release 0.1, load.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
    RouterFactory,
    add_saved_modules,
    inject,
    modules_of,
    original,
    plain_state_dict,
    report_of,
    switch_of,
)
from morsr.adapters.router import QUANTILES, Router
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors

FORMAT, FORMAT_VERSION = "morsr-adapters", 3
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_SAMPLES = 256


def save_adapters(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    name: str = "generator",
    base_id: str = "",
    extra: Mapping[str, Any] | None = None,
    attached: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one adapter set to a safetensors file, atomically.

    Args:
        path: of the file.
        model: the model that `inject` was given.
        name: of the set.
        base_id: what the base model is called; a base is recognised by its weights, the name is for messages.
        extra: values that fit JSON, given back by `read_adapters_header`.
        attached: tensors that go with the set, such as prompt embeddings, given back by `read_adapters_header`.

    Raises:
        ConfigError: no such set, or an open merge. InputError: ``extra`` does not fit JSON.
        WeightsError: NaN or infinity. An existing file is unchanged then.
    """
    report = report_of(model, name)
    if any(layer.merged for layer in report.layers):
        raise ConfigError("weights are merged; leave merged(...) before saving adapters")
    tensors = _tensors_of(report) | {f"attached.{key}": value for key, value in (attached or {}).items()}
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise WeightsError(
            f"adapters are not saved: {len(broken)} tensors hold NaN or infinity, such as {broken[0]}; go on from the "
            "last checkpoint"
        )
    header = {
        "config": report.config.to_dict(),
        "name": name,
        "base_id": base_id,
        "condition_dim": report.router.num_scores,
        "condition_names": list(report.score_names),
        "layers": prints_of_layers(report),
        "saved": list(report.copies),
        "attached": list(attached or {}),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra: expected values that fit JSON: {error}") from error
    metadata = {
        "format": FORMAT, "format_version": str(FORMAT_VERSION), "header": text, "digest": digest(text, tensors),
    }  # fmt: skip
    save_tensors(path, tensors, metadata)
    return Path(path)


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header and of the names, shapes, dtypes and bytes of tensors."""
    total = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        value = tensors[key]
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tensors_of(report: InjectionReport) -> dict[str, Tensor]:
    """All tensors of a set, by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for layer_name, layer in zip(report.layer_names, report.layers, strict=True):
        ranks = layer.sets[report.name]
        tensors |= {f"layers.{layer_name}.lora_A": ranks.lora_A, f"layers.{layer_name}.lora_B": ranks.lora_B}
    tensors |= {f"router.{key}": value for key, value in report.router.state_dict().items()}
    for one, module in report.copies.items():
        tensors |= {f"saved.{one}:{key}": value for key, value in module.state_dict().items()}
    return tensors


def load_adapters(
    path: str | os.PathLike[str], model: nn.Module, *, name: str | None = None, router: RouterFactory = Router
) -> InjectionReport:
    """Load an adapter file into a model; the set is injected if the model lacks it.

    Args:
        path: of the file. The form of its gate replaces that of a set that is there.
        model: its base, recognised by the shapes and samples of the adapted weights.
        name: to load the set under; the stored name by default.
        router: class of the router, where it is one of your own.

    Raises:
        WeightsError: an unreadable or damaged file, another base, or a set of that name with other settings.
        ConfigError: weights are merged. Nothing has changed then.
    """
    header = _read_for(path, model, router)
    config, name, switch = header["config"], name or header["name"], switch_of(model)
    if switch is not None and name in switch.reports:
        report = switch.reports[name]
        _check_same(path, report, header)
        report.route(None)
        if config.gate != report.config.gate:  # the form of the gate belongs to the weights that were trained with it
            report.config = report.router.config = dataclasses.replace(report.config, gate=config.gate)
        add_saved_modules(model, report, header["saved"])
    else:
        try:
            report = inject(
                model, config, condition_dim=header["condition_dim"], name=name, router=router,
                layers=[layer["name"] for layer in header["layers"]], saved=header["saved"],
            )  # fmt: skip
        except ConfigError as error:
            raise WeightsError(f"{path}: does not fit this model: {error}") from error
    _fill(report, header["tensors"])
    report.score_names = tuple(header["condition_names"])
    return report


def start_from_adapters(path: str | os.PathLike[str], model: nn.Module, router: RouterFactory = Router) -> str:
    """Give the generator's set what a file holds: all of the same settings, or a plain LoRA as the first shared ranks.

    Layers are found by name. Ranks that the file does not fill keep their initial values, whose update is zero.

    Returns:
        One line that says what was taken.

    Raises:
        WeightsError: an unreadable file, another base, settings of which nothing fits, or a module that it has whole
            and the set has not. Nothing has changed then.
    """
    header = _read_for(path, model, router)
    report, config, tensors = report_of(model), header["config"], header["tensors"]
    same = config.computing() == report.config.computing() and header["condition_dim"] == report.router.num_scores
    rank = config.num_ranks
    if not same and (config.num_slots or rank > report.config.num_shared):
        raise WeightsError(
            f"{path}: expected the settings of this run, or a plain LoRA of at most {report.config.num_shared} ranks, "
            f"got {rank} ranks with {config.num_slots} slots"
        )
    layers = set(report.layer_names)
    taken = layers & {layer["name"] for layer in header["layers"]}
    if not taken:
        raise WeightsError(f"{path}: none of its layers is adapted here")
    if whole := [one for one in header["saved"] if one not in report.copies]:  # no optimizer would have them
        raise WeightsError(f"{path}: {whole[0]} was trained whole; name it in model.adapters.modules_to_save")
    if not same or taken != layers:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("router.")}
    factor = config.scale / report.config.scale
    _fill(report, {key: value * factor if key.endswith(".lora_B") else value for key, value in tensors.items()})
    return f"started from {path}: {rank} ranks in {len(taken)} of {len(layers)} layers"


@torch.no_grad()
def _fill(report: InjectionReport, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of a file into a set; fewer ranks than it has become its first ones."""
    for key, place in _tensors_of(report).items():
        if key in tensors:
            place[tuple(map(slice, tensors[key].shape))].copy_(tensors[key])


# reading


def read_adapters_header(path: str | os.PathLike[str], *, whole: bool = False) -> dict[str, Any]:
    """Header of an adapter file.

    Args:
        path: of the file.
        whole: read all tensors too, and compare them with the digest.

    Returns:
        A dict with config (of MoRConfig), name, base_id, condition_dim, condition_names, layers (name, shape, print),
        saved (names of modules trained whole), attached (tensors by name), extra, and tensors.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        raise WeightsError(f"{path}: a training checkpoint; expected an adapters file (*.safetensors)")
    if not path.is_file():
        raise WeightsError(f"{path}: no such adapters file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise WeightsError(f"{path}: not a file of morsr's adapters; other LoRA files are not read")
            version = int(metadata["format_version"])
            if version > FORMAT_VERSION:
                raise WeightsError(f"{path}: format {version}, this version reads up to {FORMAT_VERSION}; update morsr")
            header = _checked(json.loads(metadata["header"]), version)
            attached = {name: f"attached.{name}" for name in header["attached"]}
            tensors = {key: file.get_tensor(key) for key in (file.keys() if whole else attached.values())}
        header["attached"] = {name: tensors[key] for name, key in attached.items()}
    except WeightsError:
        raise
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged ({error}); copy or download it again") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise WeightsError(f"{path}: its header cannot be read ({type(error).__name__}: {error})"[:300]) from error
    if whole and version >= FORMAT_VERSION and metadata.get("digest") != digest(metadata["header"], tensors):
        raise WeightsError(f"{path}: damaged, its content does not fit its digest; copy it again")
    if odd := [key for key, value in tensors.items() if value.dtype not in _DTYPES or not value.isfinite().all()]:
        raise WeightsError(f"{path}: {odd[0]}: expected finite floating-point numbers")
    return {**header, "tensors": tensors if version >= FORMAT_VERSION else _upgraded(tensors)}


def _checked(header: dict[str, Any], version: int) -> dict[str, Any]:
    """A header with the fields of the present format, each of its kind; raises one of Python's own errors otherwise."""
    layers = [
        {"name": str(e["name"]), "shape": [*map(int, e["shape"])], "print": [*map(float, e["print"])]}
        for e in header["layers"]
    ]
    if not 0 < len({layer["name"] for layer in layers}) == len(layers):
        raise ValueError("expected layers of different names")
    saved = header.get("saved", ())
    if version < FORMAT_VERSION:  # files of 0.1 name the parameters of these modules
        saved = dict.fromkeys(key.rpartition(".")[0] for key in header.get("whole", ()))
    return {
        "config": MoRConfig.from_dict({"gate": "renormalize", **header["config"]}),  # of files that name no gate
        "name": str(header["name"]),
        "base_id": str(header["base_id"]),
        "condition_dim": int(header["condition_dim"]),
        "condition_names": [*map(str, header["condition_names"])],
        "layers": layers,
        "saved": [*map(str, saved)],
        "attached": [*map(str, header.get("attached", ()))],
        "extra": dict(header.get("extra") or {}),
    }


def _read_for(path: str | os.PathLike[str], model: nn.Module, router: RouterFactory) -> dict[str, Any]:
    """Header and tensors of a file, checked against each other and the base before anything of their size is made."""
    header = read_adapters_header(path, whole=True)
    check_base(path, header, model)
    config, wanted = header["config"], dict[str, tuple[int, ...]]()
    for layer in header["layers"]:
        wanted[f"layers.{layer['name']}.lora_A"] = (config.num_ranks, *layer["shape"][1:])
        wanted[f"layers.{layer['name']}.lora_B"] = (layer["shape"][0], config.num_ranks)
    try:
        with torch.device("meta"):
            skeleton = router(config, len(header["layers"]), header["condition_dim"]).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise WeightsError(f"{path}: its settings fit no router ({type(error).__name__})") from error
    wanted |= {f"router.{key}": tuple(value.shape) for key, value in skeleton.items()}
    modules = {name: original(module) for name, module in modules_of(model)}
    for one in header["saved"]:
        wanted |= {f"saved.{one}:{key}": tuple(value.shape) for key, value in plain_state_dict(modules[one]).items()}
    wanted |= {f"attached.{key}": tuple(value.shape) for key, value in header["attached"].items()}
    found = {key: tuple(value.shape) for key, value in header["tensors"].items()}
    if odd := sorted(key for key in found | wanted if found.get(key) != wanted.get(key)):
        expected, got = (side.get(odd[0], "no such tensor") for side in (wanted, found))
        raise WeightsError(f"{path}: {odd[0]}: expected {expected}, got {got}")
    return header


def _upgraded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of release 0.1 as the present format names them.

    That release transposed ``lora_B``, knew no distribution of severities, and kept single parameters.
    """
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        module, _, last = rest.rpartition(".")
        if kind == "layers" and last == "down":
            found[f"layers.{module}.lora_A"] = value
        elif kind == "layers" and last == "up":
            found[f"layers.{module}.lora_B"] = value.t().contiguous()
        elif key == "context.severity_mean":
            found["router.severities"] = torch.linspace(0, 1, QUANTILES)
        elif kind == "whole":
            found[f"saved.{module}:{last}"] = value
        else:
            found[f"router.{rest}" if kind == "context" else key] = value
    return found


def _check_same(path: str | os.PathLike[str], report: InjectionReport, header: dict[str, Any]) -> None:
    """Refuse a file whose set computes something else than the one on the model; the form of the gate may differ."""
    mine = {**report.config.computing(), "gate": None, "number of scores": report.router.num_scores}
    theirs = {**header["config"].computing(), "gate": None, "number of scores": header["condition_dim"]}
    mine["layers"], theirs["layers"] = list(report.layer_names), [layer["name"] for layer in header["layers"]]
    if report.score_names and header["condition_names"]:
        mine["scores"], theirs["scores"] = list(report.score_names), header["condition_names"]
    if changed := [key for key in mine if mine[key] != theirs[key]]:
        raise WeightsError(f"{path}: made with other settings than the set on the model: {', '.join(changed)}")


# the base, which is known by samples of its adapted weights, never by its name


def prints_of_layers(report: InjectionReport) -> list[dict[str, Any]]:
    """Name, shape and fingerprint of every base weight under a set, by which a base is known again."""
    return [
        {"name": name, "shape": list(layer.weight.shape), "print": fingerprint(layer.weight)}
        for name, layer in zip(report.layer_names, report.layers, strict=True)
    ]


def fingerprint(weight: Tensor) -> list[float]:
    """Mean size of a sample of a weight and of its first half; equal to 1 % for one weight in whatever precision."""
    if weight.device.type == "meta":
        return []
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].abs().double()
    return [sample.mean().item(), sample[: max(1, sample.numel() // 2)].mean().item()]


def check_base(path: str | os.PathLike[str], header: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse adapters of other layers or weights than a model's; what the base is called does not count.

    Args:
        path: what the message calls the adapters.
        header: its layers (see `prints_of_layers`), base_id, and saved, the modules that were trained whole.
        model: the base, with or without adapters.

    Raises:
        WeightsError: with the first layer that differs.
    """
    modules = {name: original(module) for name, module in modules_of(model)}
    known = f" (made for {header['base_id']!r})" if header.get("base_id") else ""
    for layer in header.get("layers", ()):
        name = layer["name"]
        weight: Any = getattr(modules.get(name), "weight", None)
        shape = list(weight.shape) if isinstance(weight, Tensor) else "no such layer"
        if shape != layer["shape"]:
            raise WeightsError(f"{path}: another base{known}: {name}: expected shape {layer['shape']}, got {shape}")
        # an empty fingerprint, of the meta device, is never compared
        pairs = zip(fingerprint(weight), layer["print"], strict=False)
        if any(abs(found - stored) > 0.01 * abs(stored) + 1e-6 for found, stored in pairs):
            raise WeightsError(f"{path}: another base{known}: the weights of {name} differ")
    if missing := [one for one in header.get("saved", ()) if one not in modules]:
        raise WeightsError(f"{path}: another base{known}: no module {missing[0]} here")
