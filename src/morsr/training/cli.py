"""LightningCLI as morsr uses it: configs name classes by import path, and errors are one line."""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from morsr.errors import ConfigError, MorsrError, WeightsError, worker_death
from morsr.training.callbacks.safety import RunSafety
from morsr.training.checkpoint_io import AtomicCheckpointIO
from morsr.training.config_files import expand_configs

# Lightning's own callbacks have enums as defaults, which the dump of a config could not represent.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, choice: dumper.represent_data(choice.value))


class SaveConfig(SaveConfigCallback):
    """Keeps a run's config in the run's folder; without a logger that would be the current folder, a user's own."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class MorsrCLI(LightningCLI):
    """LightningCLI with a setting for CPU threads, metrics.csv beside TensorBoard's, and cards that hold the config."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        if config.get("ckpt_path") == "last" and (found := _last_checkpoint(config.trainer)) is not None:
            config["ckpt_path"] = str(found)
        _check_checkpoint(config.get("ckpt_path"))

    def _parse_ckpt_path(self) -> None:
        """Leave the config as the user gave it; Lightning would lay a checkpoint's hyperparameters over it."""

    def before_instantiate_classes(self) -> None:
        threads = self.config[self.subcommand].threads
        if threads > 0:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **settings: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**settings)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        first = trainer.logger
        if isinstance(first, TensorBoardLogger) and not any(isinstance(one, CSVLogger) for one in trainer.loggers):
            # Built here, because one from the config would count its own versions and write into another folder.
            table = CSVLogger(first.save_dir, name=first.name, version=first.version)
            trainer.loggers = [*trainer.loggers, table]
            # It would threaten to delete the folder's files, and means an old metrics.csv.
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        return trainer

    def before_fit(self) -> None:
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        for callback in self.trainer.callbacks:
            if isinstance(callback, RunSafety):
                callback.config = yaml.safe_load(text)


def run(arguments: Sequence[str]) -> int:
    """Run one of Lightning's subcommands and return the exit code.

    Args:
        arguments: the subcommand and its options, as on the command line.

    Raises:
        ConfigError: an unknown key, a wrong type or a missing file in the config or on the command line.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    quiet = {"exit_on_error": False}
    try:
        MorsrCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=expand_configs(arguments),
            trainer_defaults={"callbacks": [RunSafety()]},
            parser_kwargs={**quiet, **dict.fromkeys(("fit", "validate", "test", "predict"), quiet)},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,  # models build their own; what is given would come too late, and fail
        )
    except MisconfigurationException as error:
        raise ConfigError(_with_own_setting(error)) from error
    except RuntimeError as error:
        died = worker_death(error)
        if died is None:
            raise
        raise died from error
    except (ArgumentError, ValueError) as error:
        cause = _deliberate_cause(error)
        if cause is not None:
            raise cause from None
        if isinstance(error, ArgumentError):
            raise ConfigError(_with_own_setting(error)) from error
        raise
    return 0


def _last_checkpoint(trainer: Any) -> Path | None:
    """The newest checkpoint of a config's runs; Lightning would look in the new run's folder, which is empty."""

    def settings(entry: Any) -> Any:
        return (entry.get("init_args") or {}) if hasattr(entry, "get") else {}

    callbacks = trainer.get("callbacks") or []
    named = [settings(one).get("dirpath") for one in (callbacks if isinstance(callbacks, list) else [callbacks])]
    folders = [Path(folder) for folder in named if folder]
    root = Path(trainer.get("default_root_dir") or ".")
    loggers = trainer.get("logger")
    logger = loggers[0] if isinstance(loggers, list) and loggers else loggers  # the first one names the folder
    if hasattr(logger, "get") and (of_logger := settings(logger)).get("save_dir"):
        folders += Path(of_logger["save_dir"], of_logger.get("name") or "").glob("*/checkpoints")
    else:
        folders += [root / "checkpoints", *root.glob("lightning_logs/*/checkpoints")]
    found = [path for folder in folders for path in folder.expanduser().glob("*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _check_checkpoint(path: str | None) -> None:
    """Refuse a missing or damaged checkpoint before models are built and images read."""
    if path is None or path in ("best", "last", "hpc", "registry") or "://" in path:
        return
    if not Path(path).exists():
        raise WeightsError(f"{path}: no such checkpoint")
    if Path(path).is_file() and not zipfile.is_zipfile(path):  # the directory of torch's archives stands at their end
        raise WeightsError(f"{path}: not a whole checkpoint, it is damaged or cut short; take an earlier one")


def _with_own_setting(error: Exception) -> str:
    """The error in one line, and the module's own setting for what Lightning or its parser refuses."""
    own = {
        "gradient_clip_val": "model.clip instead of trainer.gradient_clip_val",
        "accumulate_grad_batches": "model.accumulate instead of trainer.accumulate_grad_batches",
        r"(--|option ')(optimizer|lr_scheduler)\b": "model.lr, model.weight_decay and model.schedule for AdamW",
    }
    message = " ".join(str(error).split())
    instead = [f"set {mine}" for pattern, mine in own.items() if re.search(pattern, message)]
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
