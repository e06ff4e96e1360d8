"""`morsr data-check`: what a config's data lacks, before a run starts."""

from __future__ import annotations

import argparse
from typing import Any

from morsr.errors import ConfigError

HELP = (
    "Name the images and recipes that a config's data module does not find; exit code 1 if there are any. Overrides "
    "such as --data.train=[photos] count as in `morsr fit`; those of model and trainer change nothing here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="YAML", help="config of a run, as for `morsr fit`")
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    """Print one line per thing that is missing; 1 if there is one.

    Raises:
        ConfigError: the config cannot be read, or has a setting that its data module does not take.
    """
    import lightning as L
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from morsr.training.config_files import read_config

    data = read_config(options.config).get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        raise ConfigError(f"{options.config}: expected a data section that names its class")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    overrides = [text for text in options.overrides if text.startswith("--data")]
    try:
        parsed = parser.parse_args([f"--config={yaml.safe_dump({'data': data})}", *overrides]).data
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    module, _, name = parsed.class_path.rpartition(".")
    kind: Any = getattr(__import__(module, fromlist=[name]), name)
    missing = kind.missing(**parsed.init_args.as_dict()) if hasattr(kind, "missing") else []
    print("\n".join(missing) or "everything is there")
    return 1 if missing else 0
