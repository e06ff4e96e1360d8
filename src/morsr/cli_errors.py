"""What jsonargparse refuses, in one short line: the setting, what was expected and given, and one remedy."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import pydoc
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

LONGEST = 160  # characters of a line

_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list, [A, B]",
    "Sequence": "a list, [A, B]", "Iterable": "a list, [A, B]",
    "tuple": "a list, [A, B]", "dict": "a mapping, {KEY: VALUE}", "NoneType": "null",
    "PositiveInt": "a whole number from 1", "NonNegativeInt": "a whole number from 0", "Path": "a path",
    "PositiveFloat": "a number above 0", "NonNegativeFloat": "a number from 0",
    "ClosedUnitInterval": "a number from 0 to 1", "OpenUnitInterval": "a number between 0 and 1",
    "Port": "a number from 1 to 65535",
}  # fmt: skip


def closest(name: str, names: Iterable[str]) -> str:
    """`did you mean NAME?` for the name that is nearest, else an empty text."""
    found = difflib.get_close_matches(name, sorted(names), 1)
    return f"did you mean {found[0]}?" if found else ""


def explain(error: Exception, parser: Any = None) -> str:
    """The innermost reason of a parser's error as one line of at most LONGEST characters.

    Args:
        error: of jsonargparse, whose text nests a reason for every member of every union of types.
        parser: knows the names on its own level, for a name that is near to an unknown one.
    """
    text = str(error)
    keys: list[str] = []
    class_path = subtypes = ""
    for line in map(str.strip, text.splitlines()):
        if found := re.match(r"(?:- )?Parser key \"(.+?)\":", line):
            keys += found[1].split(".")
            subtypes = ""
        elif found := re.match(r"(?:- )?Problem with given class_path '(.+?)'", line):
            class_path = found[1]
        elif found := re.match(r"Subtypes: \[(.*)\]$", line):
            subtypes = found[1]
        elif reason := _reason(line, keys, class_path, parser):
            return reason
        elif subtypes and (found := re.match(r"Given value: (?:NestedArg\(key='.*?', val=(.*)\)|(.*))$", line)):
            return _wrong_type(keys, subtypes, (found[1] or found[2]).strip("'\""))
    return shortened(" ".join(text.split()))


def _reason(line: str, keys: list[str], class_path: str, parser: Any) -> str:
    """What one line of the error says, if it says more than the type of one member of a union."""
    if found := re.match(r"unrecognized arguments: (-{0,2})([^\s=]+)", line):
        if class_path:
            return _unknown([*keys, *found[2].split(".")], found[2], class_path)
        dashes, name = found[1], found[2]
        known, section = _names(parser), name.partition(".")[0]
        guess = closest(name if "." not in name or section in known else section, known) if dashes else ""
        if dashes != "--" and "." in name and section in known:
            return shortened(f"{dashes}{name}: unknown argument; did you mean --{name}?")
        guess = guess.replace("mean ", "mean --") or "see --help"
        return shortened(f"{dashes}{name}: unknown {'option' if dashes else 'argument'}; {guess}")
    if found := re.search(r"Group '(.+?)' does not accept option '(.+?)'", line):
        return _unknown([*keys, *found[1].split("."), found[2]], f"{found[1]}.{found[2]}", class_path)
    if found := re.search(r"Option '(.+?)' is not accepted|Subcommand '\w+' does not accept option '(.+?)'", line):
        name = found[1] or found[2]
        if class_path:
            return _unknown([*keys, name], name, class_path)
        guess = closest(name.partition(".")[0], {known.partition(".")[0] for known in _names(parser)})
        return shortened(f"{name}: unknown setting; {guess or 'see --help'}")
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", line):
        return shortened(f"{_path(keys)}: expected a class of {found[2]}, got {found[1]}; give a subclass of it")
    if found := re.search(r"No module named '(.+?)'", line):
        place, given = os.getcwd(), re.search(r"Got value: (\S+)$", line)
        name = given[1] if given else class_path or found[1]
        return shortened(f"{_path(keys)}: cannot import {name}, no module {found[1]!r} in {place} or installed", place)
    if found := re.search(r"module '(.+?)' has no attribute '(.+?)'", line):
        guess = closest(found[2], dir(pydoc.locate(found[1]))) or f"define it in {found[1]}"
        return shortened(f"{_path(keys)}: cannot import {class_path}, {found[1]} has no {found[2]!r}; {guess}")
    if found := re.match(r"Expected an? (.+?)\. Got value: (.*)$", line):
        return _wrong_type(keys, found[1], found[2])
    if found := re.match(r"Not of type (\w+): (.*?)(?: does not conform.*)?$", line):
        value = re.sub(r".*literal.*: '|could not convert .*: '|'$", "", found[2])
        return _wrong_type(keys, found[1], value)
    if found := re.match(r"argument (-\S+): expected (?:one|at least one) argument", line):
        return shortened(f"{found[1].rpartition('/')[2][2:]}: expected a value, got none; give one")
    if found := re.match(r"the following arguments are required: (.*)", line):
        if "model" in found[1].split("."):
            return "model, data: missing; give a config, --config FILE"
        return shortened(f"{found[1].replace(', ', ' ').upper()}: missing; see --help")
    if found := re.search(r"File does not exist: '?(.+?)'?$", line):
        return shortened(f"--{_path(keys)}: no such file {found[1]}; check its name", found[1])
    return ""


def _wrong_type(keys: list[str], kinds: str, value: str) -> str:
    words = list(dict.fromkeys(word for kind in _split(kinds) for word in _words(kind)))
    if len(words) > 1 and "null" in words:
        words.remove("null")
    like = ""
    if len(words) > 8:
        like, words = "one like ", difflib.get_close_matches(value, words, 3, 0)
    expected = like + " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return shortened(f"{_path(keys)}: expected {expected}, got {value!r}", value)


def _words(kind: str) -> list[str]:
    """A type as jsonargparse prints it, in plain words."""
    kind = kind.strip().removeprefix("typing.")
    if kind.startswith("Literal["):
        return kind.removeprefix("Literal[").removesuffix("]").replace("'", "").split(", ")
    path = re.sub(r"^<class '|'>$", "", kind).partition("[")[0]
    name = path.rpartition(".")[2]
    is_settings = dataclasses.is_dataclass(pydoc.locate(path))
    return [_WORDS.get(name, f"settings of {name}, {{KEY: VALUE}}" if is_settings else f"the import path of a {name}")]


def _split(kinds: str) -> list[str]:
    """Members of a union, at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in kinds:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _unknown(keys: list[str], name: str, class_path: str) -> str:
    """A setting that a class does not have."""
    kind = pydoc.locate(class_path)
    parts = name.split(".")
    depth = next((place for place, part in enumerate(parts) if part not in settings_of(kind, parts[:place])), 0)
    known = list(settings_of(kind, parts[:depth]))
    guess = closest(parts[depth], known) or (f"there are {', '.join(known)}" if known else "see --help")
    return shortened(f"{_path(keys)}: unknown setting; {guess}")


def settings_of(kind: Any, inside: Sequence[str] = ()) -> dict[str, Any]:
    """Types of the settings of a class by name, base classes' included.

    Args:
        kind: a class, or a union that holds one.
        inside: names of settings to go down by, each to the class that its type names.
    """
    kind = class_in(kind)
    if kind is None:
        return {}
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    types = {action.dest: getattr(action, "_typehint", Any) for action in parser._actions}
    found = {name: kind for name, kind in types.items() if not name.endswith(".help")}
    return settings_of(found.get(inside[0]), inside[1:]) if inside else found


def class_in(kind: Any) -> type | None:
    """The class with settings that a type names, or the first such member of a union."""
    members = typing.get_args(kind)
    if members:
        return next((found for found in map(class_in, members) if found is not None), None)
    return kind if inspect.isclass(kind) and kind.__module__ != "builtins" else None


def _names(parser: Any) -> list[str]:
    """Settings that a parser knows, or, without one, those of a run's config."""
    if parser is None:
        trainer = [f"trainer.{name}" for name in settings_of(pydoc.locate("lightning.Trainer"))]
        first = ("config", "model", "data", "trainer", "seed_everything", "ckpt_path", "print_config")
        return [*first, *trainer]
    return [action.dest.replace("_", "-") for action in parser._actions]


def _path(keys: Sequence[str]) -> str:
    return ".".join(key for key in keys if key != "init_args")


def shortened(line: str, value: str = "") -> str:
    """At most LONGEST characters; a long value is cut in its middle first, so that the remedy stays."""
    spare = LONGEST - (len(line) - len(value))
    if value and len(line) > LONGEST and spare > 8:
        head = (spare - 1) // 2
        line = line.replace(value, f"{value[:head]}…{value[len(value) - (spare - 1 - head) :]}")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
