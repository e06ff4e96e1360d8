"""How much memory a device has left, and how to recognise that it has run out."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

UNKNOWN_FREE = 4 * 2**30
"""Bytes assumed free where the system does not say."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out; PyTorch has no one class for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the processor, of main memory within the container's limit."""
    backend = getattr(torch, device.type, None)
    if hasattr(backend, "mem_get_info"):
        free, _ = backend.mem_get_info(device)
        # What the allocator keeps for reuse is free for us though the driver counts it as taken.
        return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))
    if hasattr(backend, "recommended_max_memory"):
        return max(0, int(backend.recommended_max_memory() - backend.driver_allocated_memory()))
    return min(_system_free(), _container_free())


def release_memory(device: torch.device) -> None:
    """Hand back what a device's allocator keeps for reuse."""
    backend = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()


def trim_host_memory() -> None:
    """Hand back main memory that the C library keeps for reuse, where it can; pieces of it add up over many tiles."""
    if (trim := _c_library("malloc_trim")) is not None:
        trim(0)


@contextlib.contextmanager
def blocks_handed_back() -> Iterator[None]:
    """Let main memory from 1 MiB on go back to the system when it is freed, inside a ``with`` block.

    glibc keeps blocks of up to 32 MiB for reuse once one of that size was freed, and which of them are kept depends on
    the order of everything before: the same pass of `tiny` then took from 95 to 145 MiB. Elsewhere nothing is changed.
    """
    options = _c_library("mallopt")
    if options is None:
        yield
        return
    options(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        options(_MMAP_THRESHOLD, 32 << 20)  # where the C library's own rule ends up; it cannot be switched on again


_MMAP_THRESHOLD = -3  # glibc, malloc.h
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def _c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def _system_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return UNKNOWN_FREE


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return sys.maxsize
        taken = int((root / "memory.current").read_text()) - _reclaimable(root)
        return max(0, int(limit) - max(0, taken))
    except (OSError, ValueError):
        return sys.maxsize


def _reclaimable(root: Path) -> int:
    """Bytes that a container is charged for and that the system takes back by itself: mostly files read before."""
    try:
        lines = [line.split() for line in (root / "memory.stat").read_text().splitlines()]
        return sum(int(value) for name, value in lines if name in _RECLAIMABLE)
    except (OSError, ValueError):
        return 0
