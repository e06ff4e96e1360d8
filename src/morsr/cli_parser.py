"""Call a typed function from a command line: jsonargparse reads its signature and docstring."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from morsr.cli_errors import explain
from morsr.errors import ConfigError


def call(function: Callable[..., int | None], name: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of a command, call its function and return the exit code.

    Required parameters are positional, the others options: `--color-strength 1`, `--overwrite`, `--pred A B`. A ~ at
    the begin of a path is the home folder.

    Args:
        function: typed, with an Args section in its docstring; what stands above it is the command's description.
        name: what the command is called.
        arguments: after the command's name.

    Raises:
        ConfigError: an unknown option, a missing argument or a value of the wrong type, in one short line.
    """
    parser = build_parser(function, name)
    hints = typing.get_type_hints(function)
    try:
        options = parser.parse_args(_normalized(arguments, hints))
    except ArgumentError as error:
        raise ConfigError(_as_option(explain(error, parser), function)) from error
    values = {key: options[key] for key in hints if key != "return"}
    paths = {key: value.expanduser() for key, value in values.items() if isinstance(value, Path)}
    return function(**{**values, **paths}) or 0


def build_parser(function: Callable[..., Any], name: str) -> ArgumentParser:
    """The parser of a function's parameters."""
    summary = (function.__doc__ or "").partition("\n    Args:")[0]
    parser = ArgumentParser(
        prog=f"morsr {name}", description=" ".join(summary.split()), exit_on_error=False, allow_abbrev=False,
        formatter_class=_Formatter,
    )  # fmt: skip
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True, as_group=False)
    for action in parser._actions:
        action.option_strings = [text.replace("_", "-") for text in action.option_strings]
        if set(action.option_strings) >= {"-h"}:
            action.help = "show this help and exit"
        elif typing.get_type_hints(function).get(action.dest) is bool:
            action.metavar = ""  # a flag
    return parser


class _Formatter(DefaultHelpFormatter):
    """Writes options with dashes and without the names of Python's types."""

    def _expand_help(self, action: Any) -> str:
        text = action.help if isinstance(action.help, str) else ""
        if action.option_strings and action.default not in (None, False, [], "==SUPPRESS=="):
            text += f" (default: {action.default})"
        return text

    def _get_default_metavar_for_optional(self, action: Any) -> str:
        return str(action.dest).rpartition(".")[2].upper()

    def _get_default_metavar_for_positional(self, action: Any) -> str:
        return str(action.dest).upper()


def _normalized(arguments: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """Write options as jsonargparse reads them: underscores, true for a bare flag, all values of a list in one."""
    found: list[str] = []
    lists: dict[str, list[str]] = {}
    rest, place = list(arguments), 0
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        place += 1
        if not option.startswith("--") or option == "--":
            if option + equals + value == "":
                raise ConfigError(f"argument {place}: expected a value, got an empty one")
            found.append(option + equals + value)
            continue
        if "." in option and "overrides" in hints:  # a setting of a config
            lists.setdefault("overrides", []).append(f"{option}={value if equals or not rest else rest.pop(0)}")
            continue
        key = option[2:].replace("-", "_")
        kind = hints.get(key)
        if kind is bool and not equals:
            found.append(f"--{key}=true")
            continue
        if any(typing.get_origin(one) is list for one in (kind, *typing.get_args(kind))):
            values = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            lists.setdefault(key, []).extend(values)
        else:
            if key in hints and not equals and rest and (not rest[0].startswith("-") or _is_number(rest[0])):
                equals, value = "=", rest.pop(0)
            values = [value] if equals else [option]
            found.append(f"--{key}{equals}{value}")
        if (not values or "" in values) and key != "prompt":  # as a path it would be the current folder
            raise ConfigError(f"{option}: expected a value, got an empty one")
    return [*found, *(f"--{key}={json.dumps(values, ensure_ascii=False)}" for key, values in lists.items())]


def _as_option(line: str, function: Callable[..., Any]) -> str:
    """A parser's line with the name of an option or argument as it is written."""
    name, colon, rest = line.partition(":")
    parameter = inspect.signature(function).parameters.get(name)
    if parameter is None:
        return line
    positional = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    return f"{name.upper() if positional else '--' + name.replace('_', '-')}{colon}{rest}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
