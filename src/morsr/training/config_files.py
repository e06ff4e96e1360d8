"""Configs that extend one another: a file says what differs from its parent, and nothing else.

extends: sd21/mor.yaml          a path beside this file
model:
  init_args:
    accumulate: 4
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from morsr.errors import ConfigError


def read_config(path: str | Path, below: Sequence[Path] = ()) -> dict[str, Any]:
    """A config with everything that it extends, as plain values.

    Mappings are joined key by key; lists and single values take the parent's place, and so does a mapping that names
    another class.

    Raises:
        ConfigError: no such file, no UTF-8, no YAML mapping, or configs that extend each other in a circle.
    """
    path = Path(path)
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, by way of {' and '.join(map(str, below))}")
    try:
        config = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that is not allowed"
        raise ConfigError(f"{path}{where}: expected valid YAML, got: {problem}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a config, a mapping of settings, got {str(config)[:40]!r}")
    parent = config.pop("extends", None)
    if parent is None:
        return config
    return _joined(read_config(path.parent / str(parent), [*below, path.resolve()]), config)


def expand_configs(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments whose `--config FILE` is the joined config instead of a file that extends others."""
    expanded = list(arguments)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c") and equals:
            expanded[place] = f"{name}={_expanded(value)}"
        elif place and arguments[place - 1] in ("--config", "-c"):
            expanded[place] = _expanded(argument)
    return expanded


def _expanded(value: str) -> str:
    path = Path(value)
    if "\n" in value or not path.is_file():  # what the parser itself can read is left to it, such as a config's text
        return value
    config = read_config(path)
    # The key begins a line.
    return yaml.safe_dump(config, sort_keys=False) if re.search(r"^extends:", _text(path), re.MULTILINE) else value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: expected a YAML config in UTF-8, got: {reason}") from error


def _joined(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    if "class_path" in child and child["class_path"] != parent.get("class_path", child["class_path"]):
        return child
    result = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _joined(result[key], value) if both else value
    return result
