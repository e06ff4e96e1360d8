"""A model as a folder: adapters, what they run on, and a description that loads them again, here or on the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morsr import __version__
from morsr.adapters import save_adapters
from morsr.errors import InputError, WeightsError
from morsr.files import expanded, write_text
from morsr.hub import repository_of
from morsr.models.bases import SHIPPED_BASES
from morsr.models.bases.loading import FAMILIES
from morsr.models.bases.reading import HUB_IDS
from morsr.models.generator import OneStepGenerator

ADAPTERS_FILE = "adapters.safetensors"
CONFIG_FILE = "config.json"
FORMAT_VERSION = 1


def save_generator(
    folder: str | os.PathLike[str],
    generator: OneStepGenerator,
    *,
    include_base: bool | None = None,
) -> Path:
    """Write a generator as a folder that `load_generator` reads: config.json, adapters, and the base where it must be.

    Arguments and errors are those of `morsr.restoring.Restorer.save_pretrained`.
    """
    folder = expanded(folder)
    if folder.is_file():
        raise InputError(f"{folder}: expected a folder to save into, this is a file")
    base, estimator = generator.base, generator.estimator
    source = base.source
    if source is None or include_base is None:  # a folder here, or no source, is found on no other machine
        include_base = source not in (*SHIPPED_BASES, *HUB_IDS) and (
            source is None or repository_of(source) is None or expanded(source).is_dir()
        )
    elif include_base and type(base) not in FAMILIES:
        raise InputError(f"include_base: {type(base).__name__} is a class of your own, which comes with your code")
    include_base &= type(base) in FAMILIES
    adapters = generator.adapters
    described: dict[str, Any] = {
        "base": source or "base",
        "estimator": None if estimator is None else estimator.spec,
        "one_step": generator.one_step.to_dict(),
        "prompt": base.prompt,
    }
    if adapters is not None and (router := adapters.router.class_path):
        described["router"] = router
    file = folder / ADAPTERS_FILE
    if adapters is not None:  # first, since ranks that are not finite are refused
        save_adapters(file, base, name=adapters.name, base_id=base.base_id, extra=described, attached=base.prompts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # comes last, so that a half-written folder does not load
    if estimator is not None:
        described["estimator"] = _with_files(estimator.spec, folder)
    if include_base:
        described["base"] = "base"
        base.save(folder / "base")
    if adapters is None:
        file.unlink(missing_ok=True)
    write_description(folder, described, adapted=adapters is not None)
    return folder


def write_description(folder: Path, description: Mapping[str, Any], *, adapted: bool) -> None:
    """Write the config.json of a model folder."""
    content = {
        "library_name": "morsr",
        "library_version": __version__,
        "format_version": FORMAT_VERSION,
        "adapters": ADAPTERS_FILE if adapted else None,
        **description,
    }
    write_text(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any] | None:
    """Read the config.json of a model folder, with places inside the folder made absolute; None where there is none.

    Raises:
        WeightsError: not one of morsr's, damaged, or of a newer format.
    """
    folder = folder.absolute()  # "model/base" could be a hub id
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content["format_version"])
        base, estimator, _ = content["base"], content["estimator"], content["adapters"]
        kind, args = (estimator["kind"], dict(estimator["args"])) if estimator is not None else (None, {})
        if content["library_name"] != "morsr":
            raise KeyError("library_name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not the description of a morsr model ({error!r})") from error
    if version > FORMAT_VERSION:
        raise WeightsError(f"{path}: format {version}, this version reads up to {FORMAT_VERSION}; update morsr")
    if base in (".", "base"):
        content["base"] = str(folder / base)
    if estimator is not None:
        placed = {
            key: str(folder / value) if str(value).startswith("./estimator_") else value for key, value in args.items()
        }
        content["estimator"] = {"kind": kind, "args": placed}
    return content


def _with_files(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An estimator's spec whose files are copied into the folder and named relative to it."""
    args: dict[str, Any] = {}
    for key, value in spec["args"].items():
        args[key] = value
        if isinstance(value, (str, os.PathLike)) and expanded(value).is_file():
            name = f"estimator_{key}{Path(value).suffix}"
            if expanded(value).resolve() != (folder / name).resolve():
                shutil.copyfile(expanded(value), folder / name)
            args[key] = f"./{name}"
    return {"kind": spec["kind"], "args": args}
