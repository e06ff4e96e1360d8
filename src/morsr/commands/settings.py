"""`--model.adapters.help`, `--data.help`: the settings of a part of a config, with their types and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from morsr.cli_errors import class_in, closest, settings_of
from morsr.commands._common import user_class
from morsr.errors import ConfigError


def print_settings(arguments: Sequence[str]) -> bool:
    """Print the settings that an option such as `--model.adapters.help` asks for; False if there is none.

    Raises:
        ConfigError: the config names no such part.
    """
    asked = next((one for one in arguments if one.startswith("--") and one.endswith(".help")), "")
    section, *inside = asked[2:].removesuffix(".help").split(".")
    if section not in ("model", "data"):
        return False  # none, or Lightning's own
    kind = _class_of(section, arguments)
    for place, name in enumerate(inside):
        known = settings_of(kind)
        if name not in known:
            where = ".".join([section, *inside[: place + 1]])
            raise ConfigError(f"{where}: unknown setting; {closest(name, known) or f'see --{section}.help'}")
        kind = class_in(known[name].annotation)
        if kind is None:
            raise ConfigError(f"{asked}: {known[name]} has no settings; see --{section}.help")
    parser = ArgumentParser(prog="morsr fit", usage="morsr fit --config FILE [options]", add_help=False)
    parser.add_class_arguments(kind, ".".join([section, *inside]), fail_untyped=False)
    parser.print_help()
    return True


def _class_of(section: str, arguments: Sequence[str]) -> Any:
    """The class that the last `--config` names for a section, or the command line; else the default one."""
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
    return user_class(named, f"--{section}")
