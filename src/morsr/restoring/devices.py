"""Where and how precisely a model runs, and the memory that is left there."""

from __future__ import annotations

import os
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch

from morsr.errors import ConfigError
from morsr.functional.precision import float_type

UNKNOWN_FREE = 4 * 2**30  # bytes assumed free where the system does not say
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by a name.

    Args:
        device: "auto" takes the machine's accelerator, else the processor. Where torchrun or srun started several
            processes, each takes its own accelerator.

    Raises:
        ConfigError: no such device on this machine.
    """
    if device == "auto":
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        kind = torch.accelerator.current_accelerator()
        return torch.device(kind.type, local % torch.accelerator.device_count())  # type: ignore[union-attr]
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = textwrap.shorten(str(error).partition(". ")[0], 90, placeholder=" …")
        raise ConfigError(f"device {str(device)!r} cannot be used on this machine: {reason}") from error
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision meant by a name; "auto" is half precision on an accelerator and float32 on a processor.

    Raises:
        ConfigError: not one of float32, bfloat16 and float16.
    """
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
        if device.type in ("cuda", "xpu") and supported is not None:
            supported = partial(supported, including_emulation=False)
        return torch.bfloat16 if supported is not None and supported() else torch.float16
    return float_type(dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the processor, of main memory within the container's limit."""
    if device.type == "cpu":
        return min(_system_free(), _container_free(Path("/sys/fs/cgroup")))
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        # What torch keeps for reuse is free for us though the driver counts it as taken.
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return UNKNOWN_FREE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out; PyTorch has no one class for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _system_free() -> int:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return UNKNOWN_FREE


def _container_free(root: Path) -> int:
    """What the limit of a control group leaves; files that the system can drop from its cache count as free."""
    try:
        limit, taken = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        found = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return sys.maxsize
    cached = sum(int(found.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return limit - max(0, taken - cached)
