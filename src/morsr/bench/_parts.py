"""Where the time of a step goes: a stopwatch for named parts, and the memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Stopwatch:
    """Seconds by name, (2,): wall time, and processor time of all threads; nested parts each count their own alone.

    Args:
        device: is waited for at both ends of a part, so that a part is charged for what it started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, np.ndarray] = {}
        self._open: list[str] = []
        self._inner: list[np.ndarray] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to a name, less what parts inside it are charged with."""
        start = self._now()
        self._open.append(name)
        self._inner.append(np.zeros(2))
        try:
            yield
        finally:
            whole = self._now() - start
            inside = self._inner.pop()
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, np.zeros(2)) + whole - inside
            if self._inner:
                self._inner[-1] += whole

    @contextmanager
    def watched(self, owner: Any, methods: Mapping[str, str], *, within: str) -> Iterator[None]:
        """Charge calls of an object's methods to names (method → name), those made directly inside one part only."""

        def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if self._open[-1:] != [within]:
                    return call(*args, **kwargs)
                with self.part(name):
                    return call(*args, **kwargs)

            return run

        for method, name in methods.items():
            # Past torch's __setattr__, which would look for a module.
            object.__setattr__(owner, method, timed(getattr(owner, method), name))
        try:
            yield
        finally:
            for method in methods:
                object.__delattr__(owner, method)

    def _now(self) -> np.ndarray:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def peak_gigabytes(device: torch.device) -> float:
    """Most memory so far, in GiB: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, where the device keeps one that can be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


PASS_PARTS = {"condition": "estimator and router", "encode": "encode", "denoise": "UNet", "decode": "decode"}
"""Methods of OneStepGenerator that a pass is made of, and what a table calls them."""


def device_name(device: torch.device) -> str:
    """What a table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
