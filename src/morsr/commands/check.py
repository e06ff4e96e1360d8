"""`morsr check`: what a run lacks, in one answer, before gigabytes are read."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from morsr.commands._common import existing
from morsr.errors import MorsrError, WeightsError, class_at
from morsr.files import expanded, printable
from morsr.hub import fetch


def run(config: Path, *, overrides: list[str] | None = None) -> int:
    """Say what a run of this config lacks: base, estimator, losses' and metrics' weights, data, disk.

    Files are looked for, none is loaded or downloaded. Prints a line for each thing that is missing and returns 1, or
    one line and 0 when the run is ready. Overrides follow the config, as for morsr fit: --data.train=[photos].

    Args:
        config: of a run, as for morsr fit
        overrides: options of morsr fit
    """
    lacks = list(missing(parsed([f"--config={existing(config)}", *(overrides or ())])))
    for line in lacks:
        print(printable(f"missing  {line}"))
    print(printable(f"{config}: {len(lacks)} missing" if lacks else f"{config}: ready"))
    return 1 if lacks else 0


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of `morsr fit` with these arguments, checked by its parser; nothing is built."""
    from morsr.training.cli import MorsrCLI
    from morsr.training.cli import run as fit

    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    found: dict[str, Any] = {}

    class Stop(Exception):
        """The parser has done its work."""

    class ParsingCLI(MorsrCLI):
        def _parse_ckpt_path(self) -> None:
            found.update(self.config["fit"].as_dict())
            raise Stop

    with contextlib.suppress(Stop):
        fit(["fit", *arguments], ParsingCLI)
    return found


def missing(settings: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that a run with these settings lacks, its remedy included."""
    import torch

    from morsr.models.bases import SHIPPED_BASES
    from morsr.models.losses import VGG_FILE
    from morsr.models.metrics import metric_info, missing_weights

    model = (settings.get("model") or {}).get("init_args") or {}
    yield from missing_base(model.get("base"))
    yield from missing_estimator(model)
    if (lpips := (model.get("losses") or {}).get("lpips")) and lpips.get("weight", 1):
        place = Path(torch.hub.get_dir(), "checkpoints")
        if not (place / VGG_FILE).is_file():
            yield f"model.losses.lpips: {VGG_FILE} is not in {place}; put it there, or let fit fetch it"
    for name in ("start_from", "weights"):
        path = model.get(name)
        if path is not None and path not in SHIPPED_BASES and not (expanded(path).is_file() or has_weights(path)):
            yield f"model.{name}: no such file {path}; give an adapters file"
    callbacks = (settings.get("trainer") or {}).get("callbacks") or ()
    tables = [one.get("init_args") or {} for one in callbacks if "BenchmarkTable" in str(one)]
    wanted = [*(model.get("val_metrics") or ()), *(name for one in tables for name in one.get("metrics") or ())]
    for metric in dict.fromkeys(wanted):
        try:
            if files := missing_weights(metric_info(str(metric))):
                yield f"metrics: {metric} needs {', '.join(files)} in torch.hub's cache; score once online"
        except MorsrError as error:
            yield f"metrics: {error}"
    yield from _by_class(settings.get("data"), "data")
    checkpoint = str(settings.get("ckpt_path") or "last")
    if checkpoint != "last" and not Path(checkpoint).exists():
        yield f"ckpt_path: no such checkpoint {checkpoint}"
    yield from missing_disk(settings.get("trainer") or {}, model.get("base"))


def _by_class(part: Any, section: str) -> list[str]:
    """What a class's own `missing(**settings)` says."""
    if not isinstance(part, Mapping) or "class_path" not in part:
        return []
    ask = getattr(class_at(str(part["class_path"]), section), "missing", lambda **settings: ())
    return [line if ":" in line else f"{section}: {line}" for line in ask(**part.get("init_args") or {})]


def missing_base(base: Any) -> list[str]:
    """Whether none of the bases that a config names is shipped, a local folder or in the hub's cache."""
    from morsr.models.bases import SHIPPED_BASES
    from morsr.models.bases.loading import ARCHITECTURES
    from morsr.models.bases.reading import HUB_IDS

    if base is None or isinstance(base, Mapping):
        return _by_class(base, "model.base")
    named = [base] if isinstance(base, str) else base
    names = [one for name in named for one in HUB_IDS.get(name, (name,))]
    known = {*SHIPPED_BASES, *(f"random:{one}" for one in ARCHITECTURES)}
    if any(name in known or has_weights(name) for name in names):
        return []
    said = ", ".join(names)
    return [f"model.base: no folder with safetensors and not in the hub's cache: {said}; let fit fetch it"]


def has_weights(name: str) -> bool:
    """Whether a folder of this name, or a repository of this id in the hub's cache, holds safetensors."""
    folder = expanded(name)
    if not folder.is_dir():
        try:
            folder = fetch(name, ["*.safetensors"], local_files_only=True)
        except WeightsError:
            return False
    return next(folder.rglob("*.safetensors"), None) is not None


def missing_estimator(model: Mapping[str, Any]) -> list[str]:
    """Its class, CLIP's weights, or a file of the learned estimator."""
    from morsr.estimators.base import estimator_class

    estimator, settings = model.get("estimator"), model.get("estimator_args") or {}
    if isinstance(estimator, Mapping):
        if lines := _by_class(estimator, "model.estimator"):
            return lines
        settings = estimator.get("init_args") or {}
        estimator = str(estimator.get("class_path"))
    elif isinstance(estimator, str):
        try:
            estimator_class(estimator)
        except MorsrError as error:
            return [f"model.{error}"]
    if estimator == "clip" or str(estimator).endswith(".ClipEstimator"):
        from morsr.estimators.clip import CLIP_SOURCE

        named = str(settings.get("model") or CLIP_SOURCE)
        if not has_weights(named):
            return [f"model.estimator: CLIP is not in {named}; give a folder, or let fit fetch it"]
    weights = settings.get("weights")
    if weights and not expanded(weights).is_file():
        return [f"model.estimator: no such file {weights}; train one or give another"]
    return []


def missing_disk(trainer: Mapping[str, Any], base: Any) -> list[str]:
    """Whether the folder of the run can be written and has room for its checkpoints."""
    logger = trainer.get("logger")
    first = logger[0] if isinstance(logger, list) and logger else logger
    place = (first.get("init_args") or {}).get("save_dir") if isinstance(first, Mapping) else None
    folder = Path(place or trainer.get("default_root_dir") or ".").expanduser().absolute()
    near = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        return [f"disk: {near} cannot be written; set trainer.logger.init_args.save_dir"]
    free, wanted = shutil.disk_usage(near).free / 1e9, 0.2 if base in (None, "tiny") else 5.0
    if free < wanted:
        return [f"disk: {free:.1f} GB free in {near}, expected {wanted} for checkpoints; free some"]
    return []
