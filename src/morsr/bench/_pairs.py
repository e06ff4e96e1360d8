"""Two calls timed in turn: seconds, the ratio with its interval, and the memory of one call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

HALF_WIDTH = 0.02
_LEAST = 5  # pairs, below which an interval means little


class Clocks(NamedTuple):
    """Seconds of calls, (pairs, 2): wall time, and processor time of all threads."""

    ours: np.ndarray
    peer: np.ndarray


class Ratio(NamedTuple):
    """Geometric mean of the ratios of pairs, and its 95 % interval by Student's t."""

    ratio: float
    low: float
    high: float


def paired_ratio(ours: np.ndarray, peer: np.ndarray) -> Ratio:
    """Ratio ours / peer of times (pairs,) that were taken in turn."""
    logs = np.log(ours / peer)
    freedom = len(logs) - 1
    # The quantile of Student's t by its expansion around the normal one, good to 0.3 % from four degrees of freedom on.
    quantile = 1.96 + 2.372 / freedom + 2.822 / freedom**2 + 2.556 / freedom**3
    half = quantile * logs.std(ddof=1) / len(logs) ** 0.5
    low, middle, high = (float(np.exp(logs.mean() + sign * half)) for sign in (-1, 0, 1))
    return Ratio(middle, low, high)


def time_pairs(
    ours: Callable[[], None], peer: Callable[[], None], *, seconds: float, clock: int, device: torch.device
) -> Clocks:
    """Time two calls in turn, the order changing from pair to pair, after one untimed call of each.

    Stops once the interval's half-width is within ``HALF_WIDTH`` by the given clock (0 wall, 1 processor), or when the
    next pair would not fit into ``seconds``, the untimed calls counted; but not before there are five pairs.
    """
    start = time.perf_counter()
    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        _timed(ours, device), _timed(peer, device)
        while True:
            begun = time.perf_counter()
            calls = list(zip((ours, peer), times, strict=True))
            for call, taken in calls[:: -1 if len(times[0]) % 2 else 1]:
                taken.append(_timed(call, device))
            clocks = Clocks(*(np.array(taken) for taken in times))
            if len(times[0]) < _LEAST:
                continue
            _, low, high = paired_ratio(clocks.ours[:, clock], clocks.peer[:, clock])
            now = time.perf_counter()
            if high - low <= 2 * HALF_WIDTH or now - start + (now - begun) > seconds:
                return clocks
    finally:
        gc.enable()


def _timed(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def peak_megabytes(call: Callable[[], None], device: torch.device) -> float:
    """Most memory that a call holds at one time beyond what was held before it, in megabytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = np.cumsum([size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")])
    return float(held.max()) / 1e6
