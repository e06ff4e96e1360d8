"""What of a module goes into checkpoints, and where adapters to start from or to test are found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from morsr.adapters import read_adapters_header
from morsr.errors import WeightsError
from morsr.models.generator import OneStepGenerator


def saved_keys(module: nn.Module, trained: Iterable[nn.Parameter], generator: OneStepGenerator) -> set[str]:
    """Names of what a checkpoint holds: the trained tensors and the buffers of the adapters' context.

    The trained tensors are told apart by identity: which of them take a gradient changes within a step.
    """
    inside = {id(parameter) for parameter in trained}
    if generator.context is not None:
        inside |= {id(tensor) for tensor in (*generator.context.parameters(), *generator.context.buffers())}
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


def newest_adapters(trainer: L.Trainer, generator: OneStepGenerator) -> Path | None:
    """The newest file of adapters with the generator's configuration and base among the runs beside this one."""
    runs = Path(trainer.log_dir or trainer.default_root_dir).parent
    config = generator.context.config.to_dict() if generator.context is not None else None
    for path in sorted(runs.glob("*/adapters*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        header = read_adapters_header(path)
        if header["config"] == config and header["base_id"] == generator.backbone.base_id:
            return path
    return None
