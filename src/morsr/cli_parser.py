"""Call a typed function from a command line: jsonargparse reads its signature and docstring."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from morsr.cli_errors import explain
from morsr.errors import ConfigError
from morsr.files import expanded


def call(function: Callable[..., int | None], name: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of a command, call its function and return the exit code.

    Required parameters are positional, the others options: `--color-strength 1`, `--overwrite`, `--pred A B`. A ~ at
    the begin of a path is the home folder. A parameter `overrides` gets all from the first option on that is none of
    the function's.

    Args:
        function: typed, with an Args section in its docstring; what stands above it is the command's description.
        name: what the command is called.
        arguments: after the command's name.

    Raises:
        ConfigError: an unknown option, a missing argument or a value of the wrong type, in one short line.
    """
    hints = typing.get_type_hints(function)
    flags = {f"--{key.replace('_', mark)}" for key, kind in hints.items() if kind is bool for mark in "_-"}
    given, overrides = list(arguments), []
    if "overrides" in hints:
        own = {"--help", *(f"--{key}" for key in hints)}
        options = (i for i, one in enumerate(given) if one.startswith("--") and one.partition("=")[0] not in own)
        first = next(options, len(given))
        given, overrides = given[:first], given[first:]
    for place, one in enumerate(given):
        option, equals, value = one.partition("=")
        is_empty = not one or (option.startswith("--") and equals and not value)
        if is_empty and "--prompt" not in (option, given[place - 1]):  # as a path it would be the current folder
            raise ConfigError(f"{option or f'argument {place + 1}'}: expected a value, got an empty one")
        if option in [f"--{key}" for key in _positional(function)]:
            raise ConfigError(f"{option}: expected without its name, as in morsr {name} {option[2:].upper()}")
    parser = build_parser(function, name)
    for option, count in Counter(one.partition("=")[0] for one in given).items():
        if count > 1 and getattr(parser._option_string_actions.get(option), "nargs", None) == "+":
            raise ConfigError(f"{option}: given {count} times; give all its values at once, {option} A B")
    try:
        options = parser.parse_args([f"{one}=true" if one in flags else one for one in given])
    except ArgumentError as error:
        raise ConfigError(_as_option(explain(error, parser), function)) from error
    values = {key: options[key] for key in hints if key not in ("return", "overrides")}
    values |= {key: expanded(value) for key, value in values.items() if isinstance(value, Path)}
    return function(**values, **({"overrides": overrides} if "overrides" in hints else {})) or 0


def build_parser(function: Callable[..., Any], name: str) -> ArgumentParser:
    """The parser of a function's parameters."""
    summary, hints = (function.__doc__ or "").partition("\n    Args:")[0], typing.get_type_hints(function)
    parser = ArgumentParser(
        prog=f"morsr {name}", description=" ".join(summary.split()), exit_on_error=False, allow_abbrev=False,
        formatter_class=_Formatter,
    )  # fmt: skip
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True, as_group=False, skip={"overrides"})
    for action in parser._actions:
        action.option_strings = [text.replace("_", "-") for text in action.option_strings]
        parser._option_string_actions.update(dict.fromkeys(action.option_strings, action))
        kind = hints.get(action.dest)
        if action.dest == "help":
            action.help = "show this help and exit"
        elif kind is bool:
            action.metavar = ""  # a flag
        elif list[str] in (kind, *typing.get_args(kind)):
            action.nargs, action._typehint = "+", str
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


def _positional(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that are given without them."""
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.kind is not one.KEYWORD_ONLY]


def _as_option(line: str, function: Callable[..., Any]) -> str:
    """A parser's line with the name of an option or argument as it is written."""
    name, colon, rest = line.partition(":")
    parameter = inspect.signature(function).parameters.get(name)
    if parameter is None:
        return line
    return f"{name.upper() if name in _positional(function) else '--' + name.replace('_', '-')}{colon}{rest}"
