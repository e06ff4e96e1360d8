"""What of a module goes into checkpoints, and where adapters to start from or to test are found."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from morsr.adapters import MoRConfig, read_adapters_header
from morsr.adapters.base_check import check_base
from morsr.errors import ConfigError, WeightsError
from morsr.models.generator import OneStepGenerator

_GO_ON = (
    "; continue with the config that made it, or start a new run from its adapters file (*.safetensors) with "
    "model.start_from"
)
_NO_RESULT = {
    "text_cache",
    "local_files_only",
    "digest",
}  # where an estimator's weights are read from, not what they are


def saved_tensors(module: nn.Module, trained: Iterable[nn.Parameter], generator: OneStepGenerator) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: the trained tensors, the router's statistics, and modules_to_save.

    The trained tensors are told apart by identity: which of them take a gradient changes within a step.
    """
    inside = {id(parameter) for parameter in trained}
    if generator.adapters is not None:
        router = generator.adapters.router
        inside |= {id(tensor) for tensor in (*router.parameters(), *router.buffers())}
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in inside}


def check_settings(described: Mapping[str, Any], generator: OneStepGenerator) -> None:
    """Refuse a checkpoint that was trained on another base, or with other settings of what the adapters compute.

    Args:
        described: what the checkpoint says of itself, its "morsr".
        generator: that continues from it.

    Raises:
        WeightsError: with the settings that differ, theirs and ours.
    """
    try:
        check_base("the checkpoint", described, generator.base)
    except WeightsError as error:
        raise WeightsError(f"{error}{_GO_ON}") from error
    other = runs_otherwise(described.get("extra"), generator)
    if "adapters" in described and generator.adapters is not None:
        try:
            theirs = MoRConfig.from_dict(described["adapters"]).computing()
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"the checkpoint's adapter settings cannot be read ({error}); update morsr") from error
        mine = generator.adapters.config.computing()
        if changed := [f"{key} {theirs[key]}, not {value}" for key, value in mine.items() if theirs[key] != value]:
            other = f"adapters with {', '.join(changed)}"
    if other is not None:
        raise WeightsError(f"the checkpoint was trained to run with {other}{_GO_ON}")


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of other networks: tensors by other names, or of other shapes.

    Raises:
        WeightsError: with the first name that does not fit.
    """
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise WeightsError(
            f"the checkpoint does not fit the configured adapters and losses: {len(wanted.keys() - found.keys())} "
            f"tensors missing and {len(found.keys() - wanted.keys())} unexpected, such as {odd[0]}{_GO_ON}"
        )
    if odd := sorted(name for name in wanted if found[name].shape != wanted[name].shape):
        raise WeightsError(
            f"the checkpoint does not fit the configured adapters and losses: {len(odd)} tensors have another shape, "
            f"such as {odd[0]}, {tuple(found[odd[0]].shape)} there and {tuple(wanted[odd[0]].shape)} here{_GO_ON}"
        )


def warn_of_kept(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Tell of optimizer settings that a resumed run does not take, since the optimizers' states hold the old ones.

    Warm-up and schedule are no part of those states: a resumed run follows what its config says.
    """
    changed = [
        f"{name} {stored[name]} -> {value}"
        for name, value in now.items()
        if name not in ("warmup", "schedule") and name in stored and _plain(stored[name]) != _plain(value)
    ]
    if changed:
        rank_zero_warn(
            f"the optimizers keep the settings of the checkpoint, so this has no effect: {', '.join(changed)}; "
            "to change it, start a new run from an adapters file with model.start_from"
        )


def runs_otherwise(extra: Any, generator: OneStepGenerator) -> str | None:
    """What adapters were trained to run with, where it is not what a generator runs them with; None where it is.

    Args:
        extra: of the adapters' header.
        generator: whose UNet call and estimator are compared; one made by hand has no settings to compare.
    """
    if not isinstance(extra, Mapping):
        return None
    theirs, spec, estimator = extra.get("one_step"), extra.get("estimator"), generator.estimator
    if isinstance(theirs, Mapping):
        one_step = generator.one_step.to_dict()
        if changed := [f"{key} {value}, not {one_step.get(key)}" for key, value in theirs.items()
                       if one_step.get(key) != value]:  # fmt: skip
            return f"one_step with {', '.join(changed)}"
    if not isinstance(spec, Mapping) or estimator is None:
        return None
    kind = estimator.spec["kind"]
    if spec.get("kind") != kind:
        return f"the estimator {spec.get('kind')!r}, not {kind!r}"
    parameters = inspect.signature(type(estimator)).parameters
    usual = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
    there, here = (_plain({**usual, **(args or {})}) for args in (spec.get("args"), estimator.spec["args"]))
    changed = [f"{key} {there[key]!r}, not {here.get(key)!r}" for key in there
               if key not in _NO_RESULT and there[key] != here.get(key)]  # fmt: skip
    return f"the estimator {kind!r} with {', '.join(changed)}" if changed else None


def _plain(value: Any) -> Any:
    """As a file gives it back: lists for tuples, and paths as text."""
    return json.loads(json.dumps(value, default=os.fspath))


def newest_adapters(trainer: L.Trainer, generator: OneStepGenerator) -> Path | None:
    """The newest file of adapters with the generator's configuration and base among the runs beside this one.

    Files that were trained to run with another timestep or estimator are passed over, and damaged ones with a warning.
    """
    runs = Path(trainer.log_dir or trainer.default_root_dir).parent
    config = generator.adapters.config if generator.adapters is not None else None
    for path in sorted(runs.glob("*/adapters*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            header = read_adapters_header(path)
        except WeightsError as error:
            rank_zero_warn(f"passed over: {error}")
            continue
        with contextlib.suppress(WeightsError):  # another base
            check_base(path, header, generator.base)
            if header["config"] == config and runs_otherwise(header.get("extra"), generator) is None:
                return path
    return None
