"""Wall time and peak memory of one call."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Measured:
    """Seconds of wall time and, where the system tells, the peak memory in MiB.

    On an accelerator the memory is what its allocator held at most; on a CPU it is the highest resident size of the
    whole process during the call (Linux only).
    """

    seconds: float = 0.0
    memory_mb: float | None = None


@contextlib.contextmanager
def measured() -> Iterator[Measured]:
    """Measure the body; an accelerator is waited for before and after."""
    result = Measured()
    accelerated = torch.accelerator.is_available()
    if accelerated:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
    resident = not accelerated and _reset_resident_peak()
    started = time.perf_counter()
    try:
        yield result
    finally:
        if accelerated:
            torch.accelerator.synchronize()
        result.seconds = time.perf_counter() - started
        if accelerated:
            result.memory_mb = torch.accelerator.max_memory_allocated() / 2**20
        elif resident:
            result.memory_mb = _resident_peak()


def _reset_resident_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> float | None:
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
