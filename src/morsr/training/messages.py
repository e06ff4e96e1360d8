"""What the parser of configs says, in one short line: key, what was expected, what came."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re

_TYPES = {"Sequence": "list", "Mapping": "mapping", "NestedArg": "key"}
_LONGEST = 160


def short_message(error: Exception) -> str:
    """The innermost problem of an error of jsonargparse, which tells of every member of every union of types."""
    text = " ".join(str(error).split())
    place = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    classes = re.findall(r"given class_path '([^']+)'", text)
    if found := re.search(r"(?:Option '|unrecognized arguments?: --)([\w.]+)", text):
        name = found[1].split(".")[0] if classes else found[1]
        close = difflib.get_close_matches(name, _settings(classes[-1]) if classes else [], n=1)
        return f"{place}.{name}: unknown setting{f'; did you mean {close[0]}?' if close else ''}".lstrip(".")
    if found := re.search(r"No module named '([^']+)'", text):
        return f"{place}: no module named {found[1]}, neither installed nor in {os.getcwd()}"
    if found := re.search(r"Expected an? (.+?)\. Got value: (.*?)(?: - Expected|$)", text):
        return f"{place}: expected {_type(found[1])}, got {found[2]}"[:_LONGEST]
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _type(text: str) -> str:
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {found[1]}".replace("'", "")
    name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return _TYPES.get(name, name)


def _settings(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
