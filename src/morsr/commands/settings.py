"""`--model.adapters.help`, `--data.help`: the settings of a part of a config, with their types and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from morsr.cli_errors import class_in, closest, settings_of
from morsr.errors import ConfigError


def print_settings(arguments: Sequence[str]) -> bool:
    """Print the settings that an option such as `--model.adapters.help` asks for; False if there is none.

    Raises:
        ConfigError: the config names no such part.
    """
    asked = next((one for one in arguments if one.startswith("--") and one.endswith(".help")), None)
    if asked is None:
        return False
    section, *inside = asked[2:].removesuffix(".help").split(".")
    if section not in ("model", "data"):
        return False  # Lightning's own
    kind = _class_of(section, arguments)
    for place, name in enumerate(inside):
        known = settings_of(kind)
        if name not in known:
            where = ".".join([section, *inside[: place + 1]])
            raise ConfigError(f"{where}: unknown setting; {closest(name, known) or f'see --{section}.help'}")
        kind = class_in(known[name].annotation)
        if kind is None:
            raise ConfigError(f"{asked}: {known[name]} has no settings; see --{section}.help")
    print(f"{kind.__name__}: {(inspect.getdoc(kind) or '').partition(chr(10))[0]}")
    for name, parameter in settings_of(kind).items():
        print(f"  --{'.'.join([section, *inside, name])}  {_type(parameter.annotation)}{_default(parameter.default)}")
    return True


def _class_of(section: str, arguments: Sequence[str]) -> Any:
    """The class that the last `--config` names for a section, or the command line; else the default one."""
    import importlib

    from morsr.training.config_files import read_config

    named = {"model": "morsr.training.module.OneStepSRModule", "data": "morsr.data.RealESRGANDataModule"}[section]
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[place + 1 : place + 2])
        if option in ("--config", "-c"):
            given = read_config(value).get(section)
            named = given.get("class_path", named) if isinstance(given, dict) else named
        elif option == f"--{section}":
            named = value
    module, _, name = named.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{section}: cannot import {named}; check the class path") from error


def _type(annotation: Any) -> str:
    text = inspect.formatannotation(annotation).replace("typing.", "").replace("collections.abc.", "")
    return text.replace("NoneType", "None")


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ", required"
    return f" = {value!r}" if len(repr(value)) <= 60 else f" = {type(value).__name__}(…)"
