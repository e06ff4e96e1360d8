"""Adapter files: one safetensors file per set, with its settings, its base and a digest in the header.

Layout of format 3: ``layers.<name>.lora_A``, ``layers.<name>.lora_B``, ``router.<key>``, ``saved.<module>:<key>``
(modules_to_save) and ``attached.<key>``. Formats 1 and 2, of release 0.1, load.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from morsr.adapters.base_check import check_base, prints_of_layers
from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import (
    RouterFactory,
    adapted_layers,
    adapter_names,
    add_saved_modules,
    inject_by_name,
    layers_of_set,
    module_places,
    report_of,
)
from morsr.adapters.report import InjectionReport
from morsr.adapters.router import QUANTILES, Router
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors

FORMAT, FORMAT_VERSION = "morsr-adapters", 3
_DTYPES = {"F64", "F32", "F16", "BF16"}


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
        attached: tensors that go with the set, such as prompt embeddings, given back by `read_attached`.

    Raises:
        ConfigError: no such set, or an open merge. InputError: ``extra`` does not fit JSON.
        WeightsError: NaN or infinity. An existing file is unchanged then.
    """
    report, layers = report_of(model, name), layers_of_set(model, name)
    if any(layer.merged for _, layer, _ in layers):
        raise ConfigError("weights are merged; leave merged(...) before saving adapters")
    tensors: dict[str, Tensor] = {}
    for layer_name, _, ranks in layers:
        tensors |= {f"layers.{layer_name}.lora_A": ranks.lora_A, f"layers.{layer_name}.lora_B": ranks.lora_B}
    tensors |= {f"router.{key}": value for key, value in report.router.state_dict().items()}
    for one, module in report.copies.items():
        tensors |= {f"saved.{one}:{key}": value for key, value in module.state_dict().items()}
    tensors |= {f"attached.{key}": value for key, value in (attached or {}).items()}
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
        "layers": prints_of_layers(model, name),
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


def read_adapters_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Header of an adapter file, without its tensors.

    Returns:
        A dict with config (of MoRConfig), name, base_id, condition_dim, condition_names, layers (name, shape, print),
        saved (names of modules trained whole), attached, extra and format_version.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of a newer format.
    """
    return _open(path, lambda file, header, metadata: header)


def read_attached(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors that were attached to the set of an adapter file; none in most."""
    return _open(
        path, lambda file, header, _: {name: file.get_tensor(f"attached.{name}") for name in header["attached"]}
    )


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
        WeightsError: an unreadable or damaged file, another base, or a set of that name with other settings. Nothing
            has changed then.
    """
    header, tensors = _read_for(path, model)
    config, name = header["config"], name or header["name"]
    if any(layer.merged for _, layer in adapted_layers(model)):
        raise ConfigError("weights are merged; leave merged(...) before loading adapters")
    names = [layer["name"] for layer in header["layers"]]
    _check_tensors(path, header, tensors, router)
    if name in adapter_names(model):
        report = report_of(model, name)
        _check_same(path, report, header)
        if config.gate != report.config.gate:  # the form of the gate belongs to the weights that were trained with it
            report.config = report.router.config = dataclasses.replace(report.config, gate=config.gate)
        add_saved_modules(model, report, header["saved"])
    else:
        try:
            report = inject_by_name(
                model, config, names, header["saved"], condition_dim=header["condition_dim"], name=name,
                score_names=header["condition_names"], router=router,
            )  # fmt: skip
        except ConfigError as error:
            raise WeightsError(f"{path}: does not fit this model: {error}") from error
    _fill(model, name, tensors)
    report.score_names = tuple(header["condition_names"])
    report.route(None)
    return report


def start_from_adapters(path: str | os.PathLike[str], model: nn.Module) -> str:
    """Give the generator's set what a file holds: all of the same settings, or a plain LoRA as the first shared ranks.

    Layers are found by name. Ranks that the file does not fill keep their initial values, whose update is zero.

    Returns:
        One line that says what was taken.

    Raises:
        WeightsError: an unreadable file, another base, or settings of which nothing fits. Nothing has changed then.
    """
    header, tensors = _read_for(path, model)
    report, config = report_of(model), header["config"]
    _check_tensors(path, header, tensors, Router)
    same = config.computing() == report.config.computing() and header["condition_dim"] == report.router.num_scores
    rank = config.stored_ranks
    if not same and (config.num_slots or rank > report.config.num_shared):
        raise WeightsError(
            f"{path}: expected the settings of this run, or a plain LoRA of at most {report.config.num_shared} ranks, "
            f"got {rank} ranks with {config.num_slots} slots"
        )
    layers = set(report.layer_names)
    taken = layers & {layer["name"] for layer in header["layers"]}
    if not taken:
        raise WeightsError(f"{path}: none of its layers is adapted here")
    add_saved_modules(model, report, header["saved"])
    if not same or taken != layers:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("router.")}
    _fill(model, report.name, tensors, rank, config.scale / report.config.scale)
    return f"started from {path}: {rank} ranks in {len(taken)} of {len(layers)} layers"


@torch.no_grad()
def _fill(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], rank: int | None = None, factor: float = 1.0
) -> None:
    """Copy tensors of a file into the first ranks, the router and the saved modules of a set, where there are any."""
    places: dict[str, Tensor] = {}
    for layer, _, ranks in layers_of_set(model, name):
        places[f"layers.{layer}.lora_A"] = ranks.lora_A[:rank]
        places[f"layers.{layer}.lora_B"] = ranks.lora_B[:, :rank]
    report = report_of(model, name)
    places |= {f"router.{key}": value for key, value in report.router.state_dict().items()}
    for one, module in report.copies.items():
        places |= {f"saved.{one}:{key}": value for key, value in module.state_dict().items()}
    for key, place in places.items():
        if key in tensors:
            is_up = key.startswith("layers.") and key.endswith(".lora_B")
            place.copy_(tensors[key] * factor if is_up else tensors[key])


def _open(path: str | os.PathLike[str], read: Callable[[Any, dict[str, Any], dict[str, str]], Any]) -> Any:
    """Call a function with an open adapter file and its checked header; whatever is wrong becomes a WeightsError."""
    path = Path(path)
    if path.suffix == ".ckpt":
        raise WeightsError(f"{path}: a training checkpoint; expected an adapters file (*.safetensors)")
    if not path.is_file():
        raise WeightsError(f"{path}: no such adapters file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise WeightsError(f"{path}: not a file of morsr's adapters; a peft LoRA goes through import")
            version = int(metadata["format_version"])
            if version > FORMAT_VERSION:
                raise WeightsError(f"{path}: format {version}, this version reads up to {FORMAT_VERSION}; update morsr")
            header = _checked(json.loads(metadata["header"]), version)
            return read(file, header, metadata)
    except WeightsError:
        raise
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged ({error}); copy or download it again") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: its header cannot be read ({type(error).__name__}: {error})"[:300]) from error


def _checked(header: dict[str, Any], version: int) -> dict[str, Any]:
    """A header with the fields of the present format, each of its kind; raises one of Python's own errors otherwise."""
    settings = {"gate": "renormalize", **header["config"]}  # the gate of files that do not name it
    layers = [{"name": e["name"], "shape": [*e["shape"]], "print": [*e["print"]]} for e in header["layers"]]
    names = [layer["name"] for layer in layers]
    found = {
        "config": MoRConfig.from_dict(settings),
        "name": header["name"],
        "base_id": header["base_id"],
        "condition_dim": header["condition_dim"],
        "condition_names": list(header["condition_names"]),
        "layers": layers,
        # Files of 0.1 name parameters; `upgraded` finds their modules.
        "saved": list(header.get("saved", ()) if version >= FORMAT_VERSION else header.get("whole", {})),
        "attached": list(header.get("attached", ())),
        "extra": header.get("extra") or {},
        "format_version": version,
    }
    strings = [found["name"], found["base_id"], *found["condition_names"], *names, *found["saved"], *found["attached"]]
    if not all(isinstance(text, str) for text in strings) or not isinstance(found["extra"], dict):
        raise TypeError("expected names as text")
    numbers = [found["condition_dim"], *(side for layer in layers for side in layer["shape"])]
    if not all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers) or not layers:
        raise TypeError("expected whole numbers of at least 0, and at least one layer")
    if any(len(e["print"]) not in (0, 2) or not all(isinstance(v, float) for v in e["print"]) for e in layers):
        raise TypeError("expected samples of weights as numbers")
    if len(set(names)) < len(names):
        raise ValueError("a layer is named twice")
    return found


def _read_all(file: Any, header: dict[str, Any], metadata: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and all tensors, checked against the digest."""
    for key in file.keys():  # noqa: SIM118
        if file.get_slice(key).get_dtype() not in _DTYPES:
            raise WeightsError(f"{key}: expected floating-point numbers, got {file.get_slice(key).get_dtype()}")
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if header["format_version"] >= FORMAT_VERSION and metadata.get("digest") != digest(metadata["header"], tensors):
        raise WeightsError("the adapters file is damaged: its content does not fit its digest; copy it again")
    return header, tensors


def _read_for(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, checked against each other and against the base that they are for."""
    header, tensors = _open(path, _read_all)
    if header["format_version"] < FORMAT_VERSION:
        header["saved"], tensors = _upgraded(header["saved"], tensors, model)
    check_base(path, header, model)
    return header, tensors


def _upgraded(
    parameters: Sequence[str], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[list[str], dict[str, Tensor]]:
    """Modules to save and tensors of a file of release 0.1, as a file of the present format names them.

    That release transposed ``lora_B``, knew no distribution of severities, and kept single parameters that are trained
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


def _check_tensors(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor], router: RouterFactory
) -> None:
    """Compare the tensors with what the header says of them, before anything of that size is made."""
    config = header["config"]
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in header["layers"]:
        wanted[f"layers.{layer['name']}.lora_A"] = (config.stored_ranks, *layer["shape"][1:])
        wanted[f"layers.{layer['name']}.lora_B"] = (layer["shape"][0], config.stored_ranks)
    try:
        with torch.device("meta"):
            skeleton = router(config, len(header["layers"]), header["condition_dim"])
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise WeightsError(f"{path}: its settings fit no router ({type(error).__name__})") from error
    wanted |= {f"router.{key}": tuple(value.shape) for key, value in skeleton.state_dict().items()}
    free = tuple(f"saved.{module}:" for module in header["saved"])
    free += tuple(f"attached.{key}" for key in header["attached"])
    found = {key for key in tensors if not key.startswith(free)} if free else set(tensors)
    if odd := sorted(found ^ set(wanted)):
        raise WeightsError(f"{path}: {len(odd)} tensors are missing or unexpected, such as {odd[0]}")
    for key, value in tensors.items():
        if key in wanted and tuple(value.shape) != wanted[key]:
            raise WeightsError(f"{path}: {key}: expected shape {wanted[key]}, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise WeightsError(f"{path}: {key} holds NaN or infinity")


def _check_same(path: str | os.PathLike[str], report: InjectionReport, header: dict[str, Any]) -> None:
    """Refuse a file whose set computes something else than the one on the model; the form of the gate may differ."""
    mine = {**report.config.computing(), "gate": None, "number of scores": report.router.num_scores}
    theirs = {**header["config"].computing(), "gate": None, "number of scores": header["condition_dim"]}
    mine["layers"], theirs["layers"] = list(report.layer_names), [layer["name"] for layer in header["layers"]]
    if report.score_names and header["condition_names"]:
        mine["scores"], theirs["scores"] = list(report.score_names), header["condition_names"]
    if changed := [key for key in mine if mine[key] != theirs[key]]:
        raise WeightsError(f"{path}: made with other settings than the set on the model: {', '.join(changed)}")
