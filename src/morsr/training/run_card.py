"""What a checkpoint was made with: config, versions, seed, data, commit and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch

import morsr

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchvision", "torchmetrics", "numpy", "safetensors")


def run_card(trainer: L.Trainer, module: L.LightningModule, config: Any = None) -> dict[str, Any]:
    """Facts of a run as plain values.

    Args:
        trainer: of the run.
        module: that is trained.
        config: the resolved config, or None where the run was not started from one.
    """
    data = getattr(trainer, "datamodule", None)
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "seed": int(seed) if seed is not None else None,
        "config": config,
        "data": data.manifest() if hasattr(data, "manifest") else None,
        "versions": versions(),
        "commit": source_commit(),
        "hardware": {**hardware(), "processes": trainer.world_size, "nodes": trainer.num_nodes},
        "precision": str(trainer.precision),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of morsr and of the packages that results depend on."""
    found = {"python": platform.python_version(), "morsr": morsr.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """Commit of the checkout that morsr runs from, "+changes" added where it was edited; None without a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, memory and accelerators of this machine."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.accelerator.is_available():
        device = torch.get_device_module()
        count = torch.accelerator.device_count()
        name = getattr(device, "get_device_name", lambda index: str(torch.accelerator.current_accelerator()))
        found["accelerators"] = [name(index) for index in range(count)]
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
