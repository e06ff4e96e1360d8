"""`morsr data-check`: what a config's data lacks, before a run starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from morsr.errors import ConfigError, InputError, MorsrError

HELP = (
    "Check the data that a config names: settings, recipe, every source of train, val, test and predict, a sample of "
    "the image files, and the cache folder. Each line says ok, absent (a source marked optional) or MISSING with the "
    "reason; exit code 1 if anything is missing. Nothing is written or downloaded. Overrides such as "
    "--data.train=[photos] count as in `morsr fit`; those of model and trainer change nothing here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="YAML", help="config of a run, as for `morsr fit`")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N",
        help="look at the headers of N images per source, evenly spread; 0 looks at all (default: 200)",
    )  # fmt: skip
    parser.set_defaults(overrides=[])


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
    data = RealESRGANDataModule(**checked(settings, data_overrides(options.overrides)))
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


def data_overrides(arguments: Sequence[str]) -> list[str]:
    """Of the overrides of a config those of the data, each as one argument.

    Raises:
        ConfigError: an argument that overrides nothing of a config, or has no value.
    """
    kept, rest = [], list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        section, _, key = option.removeprefix("--").partition(".")
        if not option.startswith("--") or section not in ("data", "model", "trainer", "seed_everything"):
            raise ConfigError(f"expected overrides of the config such as --data.train=[photos], got {option}")
        if not equals and not rest:
            raise ConfigError(f"{option}: expected a value")
        value = value if equals else rest.pop(0)
        if section == "data":
            kept.append(f"--data.{key.removeprefix('init_args.')}={value}")
    return kept


def checked(settings: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings as `morsr fit` takes them, by the same parser.

    Args:
        settings: of the config.
        overrides: arguments such as ``--data.train=[photos]`` that take their place.

    Raises:
        ConfigError: one that the data module does not have, or of another kind.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from morsr.data.datamodule import RealESRGANDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RealESRGANDataModule, "data")
    try:
        taken: dict[str, Any] = parser.parse_args(
            [f"--config={yaml.safe_dump({'data': settings})}", *overrides]
        ).data.as_dict()
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return taken


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
