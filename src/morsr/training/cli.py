"""LightningCLI as morsr uses it: configs name classes by import path, and errors are one line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TQDMProgressBar,
)  # fmt: skip
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from morsr.cli_errors import explain
from morsr.errors import ConfigError, MorsrError, TrainingError, WeightsError
from morsr.training.callbacks.stopping import FinalValidation, StopBetweenSteps
from morsr.training.checkpoints import RESUME, AtomicCheckpointIO, newest_checkpoint
from morsr.training.config_files import expand_configs

# Lightning's own callbacks have enums as defaults, which the dump of a config could not represent.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, choice: dumper.represent_data(choice.value))
# So are jsonargparse's kinds of numbers, such as PositiveInt, where another class takes a setting over.
yaml.SafeDumper.add_multi_representer(int, lambda dumper, number: dumper.represent_int(int(number)))
yaml.SafeDumper.add_multi_representer(float, lambda dumper, number: dumper.represent_float(float(number)))

# jsonargparse hands on a null inside a module's settings as this word: --model.losses.gan=null.
_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: None if text == "None" else _load_yaml(text), exceptions=(yaml.YAMLError,))

_PACKAGES = ("morsr", "torch", "lightning", "diffusers", "transformers", "torchvision", "numpy", "safetensors")
# What Lightning makes of a run before it begins.
_FRESH = re.compile(r"config\.yaml|versions\.json|hparams\.yaml|metrics\.csv|events\.out\.tfevents\..*")


class SaveConfig(SaveConfigCallback):
    """Keeps a run's config and the versions that it ran with in the run's folder, where a logger has made one."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict" and trainer.loggers:
            # Asked of all processes together; the config is saved by the first one alone.
            self._folder = Path(trainer.log_dir or "")
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        versions = {"python": platform.python_version()}
        for name in _PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        (self._folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


class MorsrCLI(LightningCLI):
    """LightningCLI with a folder for each run, metrics.csv beside TensorBoard's files, and checkpoints that resume."""

    _claimed: Path | None = None

    def __init__(self, *arguments: Any, subcommand: str, **settings: Any) -> None:
        self._one = subcommand
        super().__init__(*arguments, **settings)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that runs: parsers of the others would take most of the time of a start."""
        return {self._one: super().subcommands()[self._one]}

    def _add_instantiators(self) -> None:
        """None: Lightning's write the whole config out once more, for hyperparameters that no checkpoint here holds."""

    def _parse_ckpt_path(self) -> None:
        """Look for the checkpoint; unlike Lightning's, never take settings from it."""
        config, fit = self.config[self.config["subcommand"]], self.config["subcommand"] == "fit"
        path = config.get("ckpt_path")
        if path == "best":
            raise ConfigError("ckpt_path: expected a file or last, got best, which is known within one process only")
        if path == "last":
            found = _same_for_all(lambda: newest_checkpoint(_runs(config.trainer), resumes=fit))
            if found is None and not fit:
                raise WeightsError("ckpt_path: expected a run with a whole checkpoint, found none; name a file")
            rank_zero_info(f"ckpt_path: {found or 'no checkpoint yet, the run starts at step 0'}")
            config["ckpt_path"] = path = None if found is None else str(found)
        if path is not None:
            stored = AtomicCheckpointIO().load_checkpoint(path)
            if fit and not stored.keys() >= RESUME:
                raise WeightsError(
                    f"{path}: holds weights only, so a run cannot resume from it; start a new one by model.start_from"
                )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = _deliberate_cause(error)
            if cause is None:
                raise
            raise type(cause)(self._with_path(str(cause))) from error

    def _with_path(self, message: str) -> str:
        """A message that begins with a setting's name, with its place in the config where there is one such place."""
        name = message.partition(":")[0]
        named = {key: value for key, value in self.config[self.subcommand].items() if key.endswith(f".{name}")}
        places = [key for key, value in named.items() if len(named) == 1 or f"got {value!r}" in message]
        return f"{places[0].replace('.init_args', '').removesuffix(name)}{message}" if len(places) == 1 else message

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        strategy = str(config.get("strategy"))
        if any(kind in strategy for kind in ("spawn", "fork", "notebook")):
            raise ConfigError(f"trainer.strategy: expected ddp, got {strategy}, whose processes hand over no adapters")
        given = config.get("callbacks") or []
        given = _usable(given if isinstance(given, list) else [given], config)
        if config.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
            given.append(TQDMProgressBar())
        try:
            trainer = super()._instantiate_trainer({**config, "callbacks": given}, callbacks)
        except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
            if isinstance(error, MorsrError):
                raise
            said = _with_own_setting(error)
            for name in re.findall(r"`(\w+)`", said)[:1]:
                if str(config.get(name)) not in said:
                    said = f"{said.rstrip('.')}, got {config.get(name)!r}"
            raise ConfigError(said) from error
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def instantiate_trainer(self, **settings: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**settings)
        first = trainer.logger
        if first is not None and not isinstance(first, (TensorBoardLogger, CSVLogger)) and not trainer.fast_dev_run:
            raise ConfigError(
                f"trainer.logger: expected TensorBoardLogger or CSVLogger first, which names the run's folder, got "
                f"{type(first).__name__}; give both in a list"
            )
        if isinstance(first, (TensorBoardLogger, CSVLogger)) and first._version is None and trainer.is_global_zero:
            self._claimed = claim_folder(first)
        if isinstance(first, TensorBoardLogger) and not any(isinstance(one, CSVLogger) for one in trainer.loggers):
            # Built here, because one from the config would count its own versions and write into another folder. It
            # would warn of the other files there, which it leaves alone.
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            trainer.loggers = [*trainer.loggers, CSVLogger(first.save_dir, name=first.name, version=first.version)]
        return trainer

    def before_predict(self) -> None:
        """Refuse a prediction whose results nobody would get."""
        if not any(isinstance(one, BasePredictionWriter) for one in self.trainer.callbacks):
            raise ConfigError(
                "trainer.callbacks: expected a prediction writer, got none; give one, or use morsr upscale"
            )

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            stops = [one for one in self.trainer.callbacks if isinstance(one, StopBetweenSteps)]
            if self._claimed is not None and not any(one.steps for one in stops):
                for logger in self.trainer.loggers:
                    logger.finalize("failed")
                if all(_FRESH.fullmatch(path.name) for path in self._claimed.rglob("*")):
                    shutil.rmtree(self._claimed)
                    with contextlib.suppress(OSError):  # unless they hold other runs
                        self._claimed.parent.rmdir()
                        self._claimed.parent.parent.rmdir()
            raise


def run(arguments: Sequence[str], kind: type[MorsrCLI] = MorsrCLI) -> int:
    """Run one of Lightning's subcommands and return the exit code.

    Args:
        arguments: the subcommand and its options, as on the command line.
        kind: of the command line.

    Raises:
        ConfigError: an unknown key, a wrong type or a missing file in the config or on the command line.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for classes of the user's own that a config names
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", message="The dirpath has changed from")  # a resumed run has its own folder
    quiet = {"exit_on_error": False, "allow_abbrev": False}
    try:
        kind(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            subcommand=arguments[0],
            args=expand_configs(arguments),
            trainer_defaults={"callbacks": [FinalValidation(), StopBetweenSteps()], "enable_model_summary": False},
            parser_kwargs={**quiet, arguments[0]: quiet},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,  # models build their own; what is given would come too late, and fail
        )
    except MisconfigurationException as error:
        raise ConfigError(_with_own_setting(error)) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise TrainingError(
            f"{said}; where memory ran out, lower data.num_workers. The last checkpoint is whole"
        ) from error
    except (ArgumentError, ValueError) as error:
        cause = _deliberate_cause(error)
        if cause is not None:
            raise cause from None
        if isinstance(error, ArgumentError) or str(error).startswith("You set `"):  # the latter by Lightning's launcher
            raise ConfigError(_with_own_setting(error)) from error
        raise
    return 0


def _usable(callbacks: list[Callback], config: dict[str, Any]) -> list[Callback]:
    """Callbacks without those that the trainer's other settings switch off."""
    for one in callbacks:
        if isinstance(one, (LearningRateFinder, BatchSizeFinder)):
            name = type(one).__name__
            raise ConfigError(f"trainer.callbacks: {name} does not work with alternating networks; leave it out")
        is_early = isinstance(one, ModelCheckpoint) and (one._every_n_train_steps or one._train_time_interval)
        if is_early and "val/" in f"{one.monitor} {one.filename}":
            raise ConfigError(
                "ModelCheckpoint: with every_n_train_steps or train_time_interval it would save before the validation "
                "whose value it asks for; leave them out to save after each validation"
            )
    off: list[type] = []
    off += [Checkpoint] if config.get("enable_checkpointing") is False or config.get("fast_dev_run") else []
    off += [LearningRateMonitor] if config.get("logger") is False else []
    off += [ProgressBar] if config.get("enable_progress_bar") is False else []
    return [one for one in callbacks if not isinstance(one, tuple(off))]


def claim_folder(logger: Any) -> Path:
    """Take the next version of a logger by making its folder, which only one of several runs can do."""
    taken = [_version(folder) for folder in Path(logger.root_dir).glob("version_*")]
    for version in count(max(taken, default=-1) + 1):
        logger._version = version
        with contextlib.suppress(FileExistsError):
            os.makedirs(logger.log_dir)
            return Path(logger.log_dir)
    raise AssertionError


def _same_for_all(search: Callable[[], Path | None]) -> Path | None:
    """What the first process finds; those that Lightning starts later could find a newer one."""
    if "LOCAL_RANK" not in os.environ or "MORSR_LAST" not in os.environ:
        os.environ["MORSR_LAST"] = str(search() or "")
    return Path(found) if (found := os.environ["MORSR_LAST"]) else None


def _runs(trainer: Any) -> list[Path]:
    """Where a config's runs keep their checkpoints, the newest first."""

    def settings(entry: Any) -> Any:
        return (entry.get("init_args") or {}) if hasattr(entry, "get") else {}

    callbacks = trainer.get("callbacks") or []
    named = [settings(one).get("dirpath") for one in (callbacks if isinstance(callbacks, list) else [callbacks])]
    root = Path(trainer.get("default_root_dir") or ".")
    loggers = trainer.get("logger")
    logger = loggers[0] if isinstance(loggers, list) and loggers else loggers  # the first one names the folder
    save_dir = settings(logger).get("save_dir")
    versions = Path(save_dir, settings(logger).get("name") or "") if save_dir else root / "lightning_logs"
    version = settings(logger).get("version")
    numbered = sorted(versions.expanduser().glob("version_*"), key=_version, reverse=True)
    folders = [Path(folder).expanduser() for folder in named if folder]
    if version is not None:
        folders.append(versions.expanduser() / (version if isinstance(version, str) else f"version_{version}"))
    return [*folders, *numbered, *([] if save_dir else [(root / "checkpoints").expanduser()])]


def _version(folder: Path) -> int:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def _with_own_setting(error: Exception) -> str:
    """The error in one line, and the module's own setting for what Lightning or its parser refuses."""
    own = {
        "gradient_clip_val": "model.clip instead of trainer.gradient_clip_val",
        "accumulate_grad_batches": "model.accumulate instead of trainer.accumulate_grad_batches",
        r"(--|option ')(optimizer|lr_scheduler)\b": "model.optimizers, or model.lr and model.schedule of AdamW",
    }
    message, full = explain(error), " ".join(str(error).split())
    instead = [f"set {mine}" for pattern, mine in own.items() if re.search(pattern, full)]
    return "; ".join([message.rstrip("."), *instead]) if instead else message


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _deliberate_cause(error: BaseException | None) -> MorsrError | None:
    """The error of ours that jsonargparse has wrapped in one about unions of types, if there is one."""
    while error is not None:
        if isinstance(error, MorsrError):
            return error
        error = error.__cause__ or error.__context__
    return None
