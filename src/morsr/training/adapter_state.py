"""What of a module goes into checkpoints, and where adapters to start from or to test are found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from morsr.adapters import read_adapters_header
from morsr.adapters.whole import whole_parameters
from morsr.errors import WeightsError
from morsr.models.generator import OneStepGenerator


def saved_keys(module: nn.Module, trained: Iterable[nn.Parameter], generator: OneStepGenerator) -> set[str]:
    """Names of what a checkpoint holds: the trained tensors, the adapters' context, and what came whole with them.

    The trained tensors are told apart by identity: which of them take a gradient changes within a step.
    """
    inside = {id(parameter) for parameter in trained}
    if generator.context is not None:
        inside |= {id(tensor) for tensor in (*generator.context.parameters(), *generator.context.buffers())}
        inside |= {id(tensor) for tensor in whole_parameters(generator.backbone, generator.context.whole).values()}
    return {name for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in inside}


def check_checkpoint(checkpoint: dict[str, Any], wanted: set[str], base_id: str) -> None:
    """Refuse a checkpoint of another base or of other networks.

    Raises:
        WeightsError: with the first name that does not fit.
    """
    found, stored = set(checkpoint["state_dict"]), checkpoint.get("morsr", {}).get("base_id")
    if stored != base_id:
        raise WeightsError(f"the checkpoint was trained on the base {stored!r}, this run uses {base_id!r}")
    if wanted != found:
        raise WeightsError(
            f"the checkpoint does not fit the configured adapters and losses: {len(wanted - found)} tensors missing "
            f"and {len(found - wanted)} unexpected, such as {sorted(wanted ^ found)[0]}; resume with the config that "
            "made it, or start a new run from its adapters with model.weights"
        )


def runs_otherwise(extra: Any, one_step: Mapping[str, Any], estimator: str) -> str | None:
    """What adapters were trained to run with, where it is not what a module runs them with; None where it is.

    Args:
        extra: of the adapters' header.
        one_step: settings of the module's UNet call.
        estimator: kind of its degradation estimator.
    """
    if not isinstance(extra, Mapping):
        return None
    theirs, spec = extra.get("one_step"), extra.get("estimator")
    if isinstance(theirs, Mapping) and dict(theirs) != dict(one_step):
        changed = [
            f"{key} {value}, not {one_step.get(key)}" for key, value in theirs.items() if one_step.get(key) != value
        ]
        return f"one_step with {', '.join(changed)}"
    if isinstance(spec, Mapping) and spec.get("kind") != estimator:
        return f"the estimator {spec.get('kind')!r}, not {estimator!r}"
    return None


def newest_adapters(trainer: L.Trainer, generator: OneStepGenerator, *, estimator: str) -> Path | None:
    """The newest file of adapters with the generator's configuration and base among the runs beside this one.

    Files that were trained to run with another timestep or estimator are passed over.
    """
    runs = Path(trainer.log_dir or trainer.default_root_dir).parent
    config = generator.context.config.to_dict() if generator.context is not None else None
    for path in sorted(runs.glob("*/adapters*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        header = read_adapters_header(path)
        fits = header["config"] == config and header["base_id"] == generator.backbone.base_id
        if fits and runs_otherwise(header.get("extra"), generator.one_step.to_dict(), estimator) is None:
            return path
    return None
