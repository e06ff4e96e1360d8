"""`morsr data-check`: what a config's data lacks, before a run starts."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union

from morsr.errors import ConfigError, InputError, MorsrError

HELP = (
    "Check the data that a config names: settings, recipe, every source of train, val, test and predict, a sample of "
    "the image files, and the cache folder. Each line says ok, absent (a source marked optional) or MISSING with the "
    "reason; exit code 1 if anything is missing. Nothing is written or downloaded."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="YAML", help="config of a run, as for `morsr fit`")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N",
        help="look at the headers of N images per source, evenly spread; 0 looks at all (default: 200)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Print one line per thing checked; 1 if something is missing.

    Raises:
        ConfigError: the config cannot be read, names another data module, or has a setting that it does not take.
    """
    from morsr.data.datamodule import RealESRGANDataModule
    from morsr.data.degraded import load_recipe

    if options.sample < 0:
        raise ConfigError(f"--sample: expected 0 or more, got {options.sample}")
    settings = read_data_settings(options.config)
    known = inspect.signature(RealESRGANDataModule).parameters
    unknown = sorted(str(key) for key in set(settings) - set(known))
    if unknown:
        raise ConfigError(f"{options.config}: data has no setting {', '.join(unknown)}; expected {', '.join(known)}")
    data = RealESRGANDataModule(**check_kinds(settings, typing.get_type_hints(RealESRGANDataModule.__init__)))
    report = _Report()
    report.check("recipe", str(data.recipe), lambda: load_recipe(data.recipe, data.engine).hash)
    if data.val_recipe != data.recipe:
        report.check("val_recipe", str(data.val_recipe), lambda: load_recipe(data.val_recipe, data.engine).hash)
    if data.engine == "basicsr":
        report.check("engine", "basicsr", _check_basicsr)
    if data.synthetic > 0:
        report.line("ok", "train", "dead leaves", f"{data.synthetic:.0%} of the samples, made on the device")
    least = {"train": data.crop_size, "val": data.val_multiple, "test": data.val_multiple, "predict": 1}
    for use in ("train", "val", "test", "predict"):
        if use == "train" and data.synthetic == 1:
            continue
        sources = getattr(data, use)
        absent = [_check_source(report, use, source, data.scale, least[use], options.sample) for source in sources]
        if use == "train" and all(absent):
            report.line("MISSING", use, "sources", "none of the optional ones is there; name one that is")
        if use in ("val", "test"):
            _check_names(report, use, sources)
    if data.val or data.test:
        report.check("cache", "LR images", lambda: _check_cache(data.cache_dir))
    print(f"{report.missing} missing" if report.missing else "everything is there")
    return 1 if report.missing else 0


def read_data_settings(path: str) -> dict[str, Any]:
    """The constructor's arguments of the data module that a config names.

    Raises:
        ConfigError: no such file, no YAML, no data section, or another data module.
    """
    from morsr.training.config_files import read_config

    data = read_config(path).get("data")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a config with a data section")
    if str(data.get("class_path", "")).rsplit(".", 1)[-1] != "RealESRGANDataModule":
        raise ConfigError(f"{path}: data-check knows RealESRGANDataModule, got {data.get('class_path')}")
    settings = data.get("init_args") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: data.init_args: expected a mapping of settings, got {settings!r}")
    return dict(settings)


def check_kinds(settings: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The settings as `morsr fit` takes them, which reads numbers out of text.

    Raises:
        ConfigError: a setting that is not of its kind, or a source whose path is none.
    """
    taken = {}
    for key, value in settings.items():
        try:
            taken[key] = _taken(value, kinds[key])
        except ValueError:
            raise ConfigError(f"data.{key}: expected {_words(kinds[key])}, got {value!r}") from None
    for use in ("train", "val", "test", "predict"):
        for source in taken.get(use, ()):
            paths = [part for part in ("source", "root", "lr", "hr") if isinstance(source, dict) and part in source]
            for part in paths:
                if not isinstance(source[part], str) and (part, source[part]) != ("root", None):
                    raise ConfigError(f"data.{use}: expected a path as {part}, got {source[part]!r}")
    return taken


def _taken(value: Any, kind: Any) -> Any:
    """A value of this kind; ValueError if it is of another."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(ValueError):
                return _taken(value, part)
    elif origin is Literal:
        if value in parts:
            return value
    elif origin is Sequence:
        if isinstance(value, list):
            return [_taken(entry, parts[0]) for entry in value]
    elif kind in (int, float):
        if isinstance(value, (int, kind, str)) and not isinstance(value, bool):
            return kind(value) if isinstance(value, str) else value
    elif isinstance(value, origin or kind):
        return value
    raise ValueError


def _words(kind: Any) -> str:
    """A kind of setting as an error names it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(parts)
    if origin is Sequence:
        return f"a list whose entries are {_words(parts[0])}"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return plain.get(kind, "a mapping")


class _Report:
    def __init__(self) -> None:
        self.missing = 0

    def line(self, state: str, use: str, name: str, detail: str) -> None:
        self.missing += state == "MISSING"
        print(f"{state:8}{use:9}{name}: {detail}")

    def check(self, use: str, name: str, work: Callable[[], str]) -> None:
        """Say ok with what `work` returns, or MISSING with the error it raises."""
        try:
            self.line("ok", use, name, work())
        except MorsrError as error:
            self.line("MISSING", use, name, str(error))


def _check_source(report: _Report, use: str, source: Any, scale: int, least: int, sample: int) -> bool:
    """Report one source; whether it is optional and not there."""
    from morsr.data.images import is_paired, list_images
    from morsr.data.pairs import paired_source, source_name

    if not is_paired(source):
        name = source if isinstance(source, str) else str(source.get("source"))
        report.check(use, name, lambda: _check_images(list_images(source).paths, least, sample))
        return False
    if use == "predict":
        report.check(use, source_name(source), lambda: str(len(list_images(source))))
        return False
    skipped: dict[str, str] = {}
    try:
        pairs = paired_source(source, scale=scale, skipped=skipped)
    except MorsrError as error:
        report.line("MISSING", use, source_name(source), str(error))
        return False
    if not pairs and not skipped:
        report.line("absent", use, source_name(source), f"optional, {source['lr']}")
        return True
    # only crops ask for a size: pairs are validated and tested whole
    smallest = least if use == "train" else 1
    report.check(
        use, source_name(source), lambda: _check_pairs([pair.hr for _, pair in pairs], skipped, smallest, sample)
    )
    return False


def _check_names(report: _Report, use: str, sources: list[Any]) -> None:
    from morsr.data.pairs import check_names

    try:
        check_names(sources)
    except ConfigError as error:
        report.line("MISSING", use, "names", str(error))


def _check_pairs(paths: list[str], skipped: dict[str, str], least: int, sample: int) -> str:
    """What is found of pairs with these HR files, beside others that cannot be read."""
    first = next(iter(skipped.values()), "")
    if not paths:
        raise InputError(f"none of {len(skipped)} pairs can be used; the first: {first}")
    found = _check_images(paths, least, sample, kind="pairs")
    every = len(paths) + len(skipped)
    return f"{found}; {len(skipped)} of {every} cannot be read and will be passed over: {first}" if skipped else found


def _check_images(paths: Sequence[str], least: int, sample: int, *, kind: str = "images") -> str:
    from morsr.data.images import image_size
    from morsr.data.training_set import check_size

    step = max(1, len(paths) // sample) if sample else 1
    looked_at = paths[::step]
    bad = []
    for path in looked_at:
        try:
            check_size(path, *image_size(path), least)
        except InputError as error:
            bad.append(str(error))
    if len(bad) == len(looked_at):
        raise InputError(f"none of {len(looked_at)} {kind} looked at can be used; the first: {bad[0]}")
    note = f"; {len(bad)} of {len(looked_at)} looked at will be passed over, the first: {bad[0]}" if bad else ""
    return f"{len(paths)} {kind}{note}"


def _check_basicsr() -> str:
    from morsr.degradation.basicsr_compat import import_basicsr

    import_basicsr("data.degradations")
    return "installed"


def _check_cache(cache_dir: str | None) -> str:
    from morsr.data.degraded import cache_folder

    folder = cache_folder(cache_dir)
    # the folder is made by the run: here it is enough that its nearest existing parent can be written
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{folder}: {existing} cannot be written; set data.init_args.cache_dir")
    return str(folder)
