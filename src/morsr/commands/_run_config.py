"""A run's config, joined with its overrides and checked by Lightning's parser; nothing is built."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from morsr.cli_errors import explain
from morsr.errors import ConfigError
from morsr.training.config_files import expand_configs


class _Parsed(Exception):
    """The parser has done its work."""


class _ParsingCLI(LightningCLI):
    """Stops before anything is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=int, default=0)
        parser.add_argument("--ckpt_path", type=str, default=None)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        raise _Parsed(self)


def parsed(arguments: Sequence[str]) -> LightningCLI:
    """Lightning's command line with `config` and `parser`, as for `morsr fit`.

    Args:
        arguments: `--config FILE` and overrides.

    Raises:
        ConfigError: a setting that is unknown or of the wrong type, or a file that cannot be read.
    """
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    try:
        _ParsingCLI(
            L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
            args=expand_configs(arguments), save_config_callback=None, seed_everything_default=False,
            auto_configure_optimizers=False, parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
        )  # fmt: skip
    except _Parsed as done:
        found: LightningCLI = done.args[0]
        return found
    except ArgumentError as error:
        raise ConfigError(explain(error)) from error
    raise AssertionError("the parser stops before anything is built")


def plain(value: Any) -> Any:
    """A part of a config as dictionaries and lists."""
    return value.as_dict() if hasattr(value, "as_dict") else value
