"""`--model.adapters.help`, `--data.help`: the settings of a part of a config, with their types and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from morsr.cli_errors import class_in, closest, settings_of
from morsr.commands.check import parsed
from morsr.errors import ConfigError, class_at

DEFAULTS = {"model": "morsr.training.module.OneStepSRModule", "data": "morsr.data.RealESRGANDataModule"}


def print_settings(arguments: Sequence[str]) -> bool:
    """Print the settings that an option such as `--model.adapters.help` asks for; False if there is none."""
    asked = next((one for one in arguments if one.startswith("--") and one.endswith(".help")), "")
    section, *inside = asked[2:].removesuffix(".help").split(".")
    if section not in ("model", "data"):
        return False  # none, or Lightning's own
    kind = _class_of(section, [one for one in arguments[1:] if one != asked])
    for place, name in enumerate(inside):
        known = settings_of(kind)
        if name not in known:
            where = ".".join([section, *inside[: place + 1]])
            raise ConfigError(f"{where}: unknown setting; {closest(name, known) or f'see --{section}.help'}")
        kind = class_in(known[name])
        if kind is None:
            raise ConfigError(f"{asked}: {known[name]} has no settings; see --{section}.help")
    parser = ArgumentParser(prog="morsr fit", usage="morsr fit --config FILE [options]", add_help=False)
    parser.add_class_arguments(kind, ".".join([section, *inside]), fail_untyped=False)
    parser.print_help()
    return True


def _class_of(section: str, arguments: Sequence[str]) -> Any:
    """The class that a run with these arguments has in a section; without a config, morsr's own."""
    given = parsed(arguments) if any(one.startswith(("-c", "--config")) for one in arguments) else {}
    return class_at(given.get(section, {}).get("class_path", DEFAULTS[section]), f"--{section}")
