"""What the callbacks share: the run's folder, the routing of the last step, files that appear whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The folder that the run's first logger writes to; every process of a distributed run must call this."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def routing_context(pl_module: L.LightningModule) -> Any | None:
    """The routing context of the module's generator, or None for a model without routing."""
    return getattr(getattr(pl_module, "generator", None), "context", None)


def last_routing(pl_module: L.LightningModule) -> tuple[Any, Any] | None:
    """Routing and degradation scores of the module's last step, or None where it kept none."""
    output = getattr(pl_module, "last_output", None)
    if output is None or output.routing is None:
        return None
    return output.routing, output.scores


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path` in one step.

    A run that is killed half-way leaves either the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
