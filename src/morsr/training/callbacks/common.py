"""What the callbacks share: the run's folder, the routing of the last step, files that appear whole."""

from __future__ import annotations

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
