"""Texts of the CLIP estimator: named sets of positive and negative prompts, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from morsr.errors import ConfigError


@dataclass(frozen=True)
class PromptSet:
    """Names of the dimensions and, for each, the texts of its positive and of its negative side."""

    names: tuple[str, ...]
    positive: tuple[tuple[str, ...], ...]
    negative: tuple[tuple[str, ...], ...]


def prompt_set_names() -> tuple[str, ...]:
    """The sets that come with the package."""
    folder = resources.files("morsr.estimators.prompts")
    return tuple(sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_prompts(source: str | Path = "pairs") -> PromptSet:
    """Read a prompt set: the name of a shipped one, or the path of a YAML file of the same form.

    Raises:
        ConfigError: no such set or file, not YAML, or an entry that is missing, unknown or empty.
    """
    import yaml

    if str(source) in prompt_set_names():
        text = resources.files("morsr.estimators.prompts").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"prompts: {source} is neither a file nor one of {', '.join(prompt_set_names())}")
        text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"prompts: {source} is not YAML: {str(error).splitlines()[0]}") from error
    return _parse(content, source)


def _parse(content: Any, source: str | Path) -> PromptSet:
    if not isinstance(content, dict) or not isinstance(content.get("dimensions"), dict) or not content["dimensions"]:
        raise ConfigError(f"prompts: {source} needs an entry `dimensions` with at least one named pair")
    unknown = set(content) - {"dimensions", "templates"}
    if unknown:
        raise ConfigError(
            f"prompts: {source} has the unknown entry {sorted(unknown)[0]!r}; known: dimensions, templates"
        )
    templates = _texts(content.get("templates", "{}"), f"{source}: templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"prompts: {source}: a template holds {{}} once, got {template!r}")
    sides: dict[str, list[tuple[str, ...]]] = {"positive": [], "negative": []}
    for name, pair in content["dimensions"].items():
        if not isinstance(pair, dict) or set(pair) != set(sides):
            raise ConfigError(
                f"prompts: {source}: dimension {name!r} needs exactly `positive` and `negative`, got {pair!r}"
            )
        for side, found in sides.items():
            texts = _texts(pair[side], f"{source}: {name}.{side}")
            found.append(tuple(template.format(text) for template in templates for text in texts))
    names = tuple(str(name) for name in content["dimensions"])
    return PromptSet(names, tuple(sides["positive"]), tuple(sides["negative"]))


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"prompts: {where} must be a text or a list of texts, got {value!r}")
    return tuple(texts)
