"""`morsr schema`: a JSON schema of configs, for completion and checks in editors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from typing import Any, Literal

from morsr.cli_errors import settings_of
from morsr.errors import class_at

MODELS = (
    "morsr.training.module.OneStepSRModule",
    "morsr.training.base_phases.AutoencoderTraining",
    "morsr.training.base_phases.DiffusionTraining",
    "morsr.training.estimator.LearnedEstimatorTraining",
)


def run() -> int:
    """Print a JSON schema of the configs of morsr fit: morsr schema > config.schema.json.

    Editors with a YAML language server complete settings where a config begins with the line
    "# yaml-language-server: $schema=config.schema.json".
    """
    import lightning as L

    sections = {
        "seed_everything": {"type": ["integer", "boolean"]},
        "extends": {"type": "string", "description": "a config that this one changes"},
        "ckpt_path": {"type": ["string", "null"], "description": "checkpoint to resume from; last for the newest"},
        "return_predictions": {"type": "boolean"},
        "trainer": _object(L.Trainer),
        "model": _one_of(*MODELS),
        "data": _one_of("morsr.data.RealESRGANDataModule"),
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A config of morsr", "type": "object"}
    print(json.dumps({**schema, "properties": sections, "additionalProperties": False}, indent=1))
    return 0


def _one_of(*known: str) -> dict[str, Any]:
    """A mapping with class_path and init_args, of any class; the settings of ours are known."""
    rules = [
        {
            "if": {
                "properties": {"class_path": {"pattern": rf"^morsr\..*\b{path.rpartition('.')[2]}$"}},
                "required": ["class_path"],
            },
            "then": {"properties": {"init_args": _object(class_at(path, "schema"))}},
        }
        for path in known
    ]
    properties = {"class_path": {"type": "string"}, "init_args": {"type": "object"}}
    return {"type": "object", "properties": properties, "allOf": rules}


def _object(kind: Any) -> dict[str, Any]:
    """The settings of a class."""
    found: dict[str, Any] = {"type": "object", "additionalProperties": False}
    found["description"] = (inspect.getdoc(kind) or "").partition("\n")[0]
    found["properties"] = {name: _schema(one) for name, one in settings_of(kind).items()}
    return found


def _schema(kind: Any) -> dict[str, Any]:
    """The names of settings and the choices that a type allows; other values are not checked here."""
    if typing.get_origin(kind) is Literal:
        return {"enum": list(typing.get_args(kind))}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(one) for one in typing.get_args(kind)]}
    if kind is types.NoneType:
        return {"type": "null"}
    return _object(kind) if dataclasses.is_dataclass(kind) else {}
