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
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        config = yaml.safe_load(text)
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: expected a YAML config in UTF-8, got: {reason}") from error
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
    """A command line with each `--config FILE` joined with what it extends, and before the overrides, which so count.

    Raises:
        ConfigError: a config that cannot be read, or a setting without a value.
    """
    configs: list[str] = []
    others: list[str] = []
    rest = list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c") and (equals or rest):
            value = value if equals else rest.pop(0)
            if "\n" not in value and Path(value).is_file():  # else the text of one, or missing
                value = yaml.safe_dump(read_config(value), sort_keys=False)
            configs.append(f"--config={value}")
        elif re.fullmatch(r"--[\w.]+\.(?!help)\w+", argument) and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"{argument[2:]}: expected a value, got none; give {argument}=VALUE")
        else:
            others.append(argument)
    return [*arguments[:1], *configs, *others]


def _joined(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    if "class_path" in child and child["class_path"] != parent.get("class_path", child["class_path"]):
        return child
    result = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _joined(result[key], value) if both else value
    return result
